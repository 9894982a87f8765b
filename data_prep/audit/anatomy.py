"""Is it a chest, and which way up? Anatomy found in the voxels alone, whatever the headers said.

Slices are the shards' canonical ones: from the feet to the head, rows from front to back, columns from the
patient's right to the left. Shapes: Z slices of a volume, G of the coarser grid that anatomy is sought on.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

GRID_MM = 4.0
"""Slice distance of the coarser grid, at most; thinner slices are averaged, which also takes out noise."""

AIR_HU = -500
"""Less is air or lung, more is tissue: half way between them, so that borders fall where they are."""

BONE_HU = 250
"""More is bone. Vessels filled with contrast may reach it too, and weigh less than a vertebra."""

AIRWAY_HU = -900
"""An airway's median is below, a piece of lung's above."""

MIN_LUNG_LITRES = 0.1
"""Smaller pieces of enclosed air are bowel gas. Our choice."""

_IN_PLANE = np.zeros((3, 3, 3), bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)


class Anatomy(NamedTuple):
    """What the coarser grid shows.

    Args:
        hu: ``(G, 128, 128)`` float32.
        voxel_mm: of the grid as (z, y, x).
        body: ``(G, 128, 128)`` the patient without table, lungs and gas.
        enclosed: ``(G, 128, 128)`` what the body shuts off from the border of its slice.
        lungs: ``(G, 128, 128)`` enclosed air large enough to be lung, with the airways that open into it.
    """

    hu: np.ndarray
    voxel_mm: tuple[float, float, float]
    body: np.ndarray
    enclosed: np.ndarray
    lungs: np.ndarray


class Extent(NamedTuple):
    """First and last index along each axis.

    Args:
        slices: of the coarser grid.
        rows: see ``slices``.
        columns: see ``slices``.
    """

    slices: tuple[int, int]
    rows: tuple[int, int]
    columns: tuple[int, int]


def find_anatomy(
    planes: np.ndarray, shape: tuple[int, int], spacing_mm: tuple[float, float, float]
) -> Anatomy:
    """Find body and lungs.

    Args:
        planes: int16 HU ``(Z, 128, 128)``: every slice at the centres of the masks' grid.
        shape: height and width of the full slices.
        spacing_mm: of the full slices as (x, y, z).

    Returns:
        What there is; masks of what was not found are empty.
    """
    step = grid_step(len(planes), spacing_mm[2])
    whole = len(planes) // step * step
    hu = planes[:whole].reshape(-1, step, *planes.shape[1:]).mean(1, dtype=np.float32)
    voxel_mm = (
        spacing_mm[2] * step,
        spacing_mm[1] * shape[0] / planes.shape[1],
        spacing_mm[0] * shape[1] / planes.shape[2],
    )
    body = _largest(ndimage.binary_opening(hu > AIR_HU, _IN_PLANE))
    enclosed = _enclosed(body)
    least_voxels = MIN_LUNG_LITRES * 1e6 / math.prod(voxel_mm)
    return Anatomy(hu, voxel_mm, body, enclosed, _large_pieces(enclosed & (hu < AIR_HU), least_voxels))


def grid_step(num_slices: int, spacing_z_mm: float) -> int:
    """Return how many slices make one of the coarser grid.

    Example:
        >>> grid_step(300, 1.0), grid_step(300, 3.0), grid_step(2, 0.5)
        (4, 1, 2)
    """
    return min(num_slices, max(1, int(GRID_MM / spacing_z_mm)))


def measure_anatomy(anatomy: Anatomy) -> dict[str, float]:
    """Answer the questions about body and lungs, by name of the rule; NaN where one does not apply."""
    extent = extent_of(anatomy.body)
    if extent is None:
        return {"lungs": 0.0, "corners": _corners_hu(anatomy.hu)}
    measures = {
        "lungs": float(anatomy.lungs.sum()) * math.prod(anatomy.voxel_mm) / 1e6,
        "corners": _corners_hu(anatomy.hu),
        "width": _width_by_depth(anatomy),
        "spine": _place_of_bone(anatomy, extent),
        "table": _share_behind(anatomy, extent),
    }
    lungs = extent_of(anatomy.lungs)
    if lungs is not None:
        measures["airway"] = _airway_at_the_top(anatomy, extent, lungs)
        measures["heart"] = _heart_left_mm(anatomy, extent, lungs)
    return measures


def extent_of(mask: np.ndarray) -> Extent | None:
    """Return where a mask begins and ends; None where it is empty."""
    if not mask.any():
        return None
    places = [np.flatnonzero(mask.any(axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    return Extent(*((int(place[0]), int(place[-1])) for place in places))


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, number = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=number + 1)
    sizes[0] = 0
    return (labels == sizes.argmax()) & mask


def _enclosed(mask: np.ndarray) -> np.ndarray:
    labels, number = ndimage.label(~mask, _IN_PLANE)
    outside = np.zeros(number + 1, bool)
    outside[0] = True
    for border in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outside[border] = True
    return ~outside[labels]


def _large_pieces(air: np.ndarray, least_voxels: float) -> np.ndarray:
    """Keep pieces of a least size that are a tenth of the largest, which bowel gas is not."""
    labels, number = ndimage.label(air)
    sizes = np.bincount(labels.ravel(), minlength=number + 1)
    sizes[0] = 0
    return ((sizes >= least_voxels) & (sizes >= sizes.max() / 10))[labels] & air


def _corners_hu(hu: np.ndarray) -> float:
    side = hu.shape[1] // 16
    rims = (slice(None, side), slice(-side, None))
    return float(np.median([hu[:, rows, columns] for rows in rims for columns in rims]))


def _width_by_depth(anatomy: Anatomy) -> float:
    """Median over the slices with much lung; over all where there is none."""
    area = anatomy.lungs.sum((1, 2))
    ratios = []
    for plane in anatomy.body[area >= area.max() / 2]:
        if plane.any():
            depth, width = (np.ptp(np.flatnonzero(plane.any(axis))) + 1 for axis in (1, 0))
            ratios.append(width * anatomy.voxel_mm[2] / (depth * anatomy.voxel_mm[1]))
    return float(np.median(ratios)) if ratios else math.nan


def _central_bone(anatomy: Anatomy, extent: Extent) -> np.ndarray:
    """Rows and columns ``(K, 2)`` of bone in the body's middle third from side to side."""
    left, right = _part(extent.columns, 1 / 3), _part(extent.columns, 2 / 3)
    bone = (anatomy.hu[:, :, left:right] > BONE_HU) & anatomy.body[:, :, left:right]
    return np.argwhere(bone)[:, 1:] + (0, left)


def _part(ends: tuple[int, int], share: float) -> int:
    return ends[0] + round(share * (ends[1] + 1 - ends[0]))


def _place_of_bone(anatomy: Anatomy, extent: Extent) -> float:
    """Mean row of central bone, which is mostly spine: 0 at the body's front, 1 at its back."""
    places = _central_bone(anatomy, extent)
    front, back = extent.rows
    return float((places[:, 0].mean() - front) / max(back - front, 1)) if len(places) else math.nan


def _share_behind(anatomy: Anatomy, extent: Extent) -> float:
    """Share of table, blankets and tubes behind the body's middle; NaN for less than 0.1 litre of them."""
    near = ndimage.binary_dilation(anatomy.body | anatomy.lungs, iterations=3)
    rows = np.nonzero((anatomy.hu > -700) & ~near)[1]
    if len(rows) * math.prod(anatomy.voxel_mm) < 0.1e6:
        return math.nan
    return float((rows > sum(extent.rows) / 2).mean())


def _airway_at_the_top(anatomy: Anatomy, extent: Extent, lungs: Extent) -> float:
    """Share of the slices with a windpipe in the upper third of the lungs, less that in the lower third.

    A windpipe is a piece of enclosed air of 0.7 to 8 square centimetres within a slice, dark as air, midway
    from front to back and from side to side. Stomach gas is too far left and too far in front.
    """
    labels, number = ndimage.label(anatomy.enclosed & (anatomy.hu < -700), _IN_PLANE)
    sizes = np.bincount(labels.ravel(), minlength=number + 1)
    area_cm2 = sizes * math.prod(anatomy.voxel_mm[1:]) / 100
    pieces = np.flatnonzero((area_cm2 > 0.7) & (area_cm2 < 8))
    pieces = pieces[pieces > 0]
    third = (lungs.slices[1] + 1 - lungs.slices[0]) // 3
    if len(pieces) == 0 or third == 0:
        return math.nan
    num_dark = np.bincount(labels[anatomy.hu < AIRWAY_HU], minlength=number + 1)
    dark = num_dark[pieces] > sizes[pieces] / 2  # so is the median, which would take sorting
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, pieces)).reshape(-1, 3)
    middle = np.ones(len(pieces), bool)
    for axis, ends in ((1, extent.rows), (2, extent.columns)):
        middle &= (centres[:, axis] >= _part(ends, 0.35)) & (centres[:, axis] <= _part(ends, 0.65))
    has_airway = np.zeros(len(anatomy.hu), bool)
    has_airway[centres[dark & middle, 0].astype(int)] = True
    within = has_airway[lungs.slices[0] : lungs.slices[1] + 1]
    return float(within[-third:].mean() - within[:third].mean()) if has_airway.any() else math.nan


def _heart_left_mm(anatomy: Anatomy, extent: Extent, lungs: Extent) -> float:
    """Centre of what lies between the lungs in front of the spine, to the left of the spine's own.

    At 30 to 60 % of the lungs' height, above the dome of the liver, which would draw it to the right.
    """
    bone = _central_bone(anatomy, extent)
    middle = sum(lungs.rows) // 2
    spine = bone[bone[:, 0] > middle, 1]
    part = slice(_part(lungs.slices, 0.3), _part(lungs.slices, 0.6))
    lung = anatomy.lungs[part, :middle]
    right_of = np.logical_or.accumulate(lung, axis=2)
    left_of = np.logical_or.accumulate(lung[:, :, ::-1], axis=2)[:, :, ::-1]
    heart = np.nonzero(right_of & left_of & (anatomy.hu[part, :middle] > -200))[2]
    if len(spine) == 0 or len(heart) * math.prod(anatomy.voxel_mm) < 0.05e6:
        return math.nan
    return float((heart.mean() - spine.mean()) * anatomy.voxel_mm[2])
