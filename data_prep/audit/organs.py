"""Does a label map belong to its scan, and do its organs lie where organs lie?

Slices are the shards' canonical ones: from the feet to the head, rows from front to back, columns from the
patient's right to the left. Shapes: Z slices.
"""

import math

import numpy as np

from common.cohort.cohort import load_labels
from common.ct.anatomy import AIR_HU
from common.shards.codec import NUM_TS_CLASSES

NAMES = tuple(label.name for label in load_labels("totalsegmentator"))

MIN_VOXELS = 50
"""Groups of organs with fewer voxels of the 128 x 128 grid are not judged: our choice, about 1 millilitre."""


def _ids(*beginnings: str) -> np.ndarray:
    return np.array([name.startswith(beginnings) for name in NAMES])


LUNGS = _ids("lung_")
VERTEBRAE = _ids("vertebrae_")
BONES = VERTEBRAE | _ids("rib_", "sternum", "sacrum", "hip_", "scapula_", "clavicula_", "humerus_", "femur_")
LIVER = _ids("liver")
CHEST = LUNGS | _ids("heart", "trachea", "pulmonary_vein")
ABDOMEN = LIVER | _ids("spleen", "kidney_right", "kidney_left", "stomach", "pancreas", "gallbladder")
LEFT_ORGANS = _ids("spleen", "stomach", "heart")
SOLID = LIVER | _ids("spleen", "kidney_", "heart", "aorta", "autochthon_", "spinal_cord") | BONES
NAMED_LEFT = np.array(["_left" in name for name in NAMES])
NAMED_RIGHT = np.array(["_right" in name for name in NAMES])
FRONT = LIVER | _ids("heart", "sternum")


def measure_organs(
    planes: np.ndarray, ts: np.ndarray, shape: tuple[int, int], spacing_mm: tuple[float, float, float]
) -> dict[str, float]:
    """Measure a label map, by name of the rule; NaN where one does not apply.

    Args:
        planes: int16 HU ``(Z, 128, 128)``: every slice at the centres of the masks' grid.
        ts: uint8 TotalSegmentator ids ``(Z, 128, 128)``.
        shape: height and width of the full slices.
        spacing_mm: spacing of the full slices as (x, y, z).
    """
    tissue = max(1, int(np.count_nonzero(planes > AIR_HU)))
    measures = {"organs": int(np.count_nonzero(ts)) / tissue}
    for name, group in (("organs_lungs", LUNGS), ("organs_bones", BONES)):
        hu = planes[group[ts]]
        measures[name] = float(np.median(hu)) if len(hu) >= MIN_VOXELS else math.nan
    solid = planes[SOLID[ts]]
    measures["organs_air"] = float((solid < AIR_HU).mean()) if len(solid) >= MIN_VOXELS else math.nan
    row_mm, column_mm = (
        mm * size / plane
        for mm, size, plane in zip((spacing_mm[1], spacing_mm[0]), shape, ts.shape[1:], strict=True)
    )
    voxels = organ_voxels(ts)
    z, row, column = _sums(ts)

    def apart(place: np.ndarray, one: np.ndarray, other: np.ndarray, mm: float) -> float:
        """How far the first group's centre is past the second's."""
        if voxels[one].sum() < MIN_VOXELS or voxels[other].sum() < MIN_VOXELS:
            return math.nan
        return float((place[one].sum() / voxels[one].sum() - place[other].sum() / voxels[other].sum()) * mm)

    return measures | {
        "organs_head": apart(z, CHEST, ABDOMEN, spacing_mm[2]),
        "organs_side": apart(column, LEFT_ORGANS, LIVER, column_mm),
        "organs_named": apart(column, NAMED_LEFT, NAMED_RIGHT, column_mm),
        "organs_back": apart(row, VERTEBRAE, FRONT, row_mm),
    }


def organ_voxels(ts: np.ndarray) -> np.ndarray:
    """Count the voxels of each id: ``(118,)`` int64."""
    return np.bincount(ts.ravel(), minlength=NUM_TS_CLASSES)


def _sums(ts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum of slice, row and column over the voxels of each id: ``(118,)`` each."""
    places = np.nonzero(ts)
    ids = ts[places]
    z, row, column = (np.bincount(ids, place, NUM_TS_CLASSES) for place in places)
    return z, row, column
