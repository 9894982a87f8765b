"""Whether a volume looks like a CT of a chest, which is what encoders and probes were trained on."""

# Z slices, H side of a slice

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from common.ct.rejection import RejectedError, RejectedVolume
from common.embeddings.sources import CTSource

NOT_CHEST_CT = "not a chest CT"

# All bounds are our choice. A real whole chest (LIDC-IDRI-0314: 138 slices, 276 mm high, 400 mm wide, lung
# over 200 mm) and the phantom's chests (lung over 210 to 290 mm) lie well inside, real abdomens with bases of
# lungs (20 to 70 mm) outside, as the tests check. CT-RATE and RAD-ChestCT are gated and were not measured: a
# scan that is refused wrongly goes through with force.
MIN_SLICES = 20
"""A chest of 150 mm in slices of 7.5 mm."""
HEIGHT_MM = (150.0, 700.0)
"""From the lungs of a small adult to a trunk from neck to pelvis; slabs and whole bodies lie outside."""
WIDTH_MM = (200.0, 700.0)
"""Field of view: a heart alone is reconstructed at less, and no gantry is wider."""
AIR_HU, MIN_AIR = -900.0, 0.01
"""Share of voxels at most this: around the patient and in the airways. A half is usual."""
TISSUE_HU, MIN_TISSUE = (-200.0, 300.0), 0.05
"""Share of voxels between: fat, muscle, blood. A quarter is usual; a CT rescaled twice has none."""
DENSE_HU, MAX_DENSE = 600.0, 0.10
"""Share of voxels above: bone and metal, some 1 %. Of raw values without their intercept, all tissue."""
LUNG_HU = (-950.0, -500.0)
"""Of aerated lung; gas in the bowel is below, and so is half of a lung with severe emphysema."""
MIN_LUNG_CM2, MIN_LUNG_MM = 30.0, 120.0
"""Height of the slices that show this much lung: bases above an abdomen show less, whole lungs 200 mm."""
LOOK_MM = (5.0, 3.0, 3.0)
"""Voxels are looked at this far apart (slices, rows, columns), or at each where they lie further apart."""
WITHIN_SLICES = np.zeros((3, 3, 3), int)
WITHIN_SLICES[1] = ndimage.generate_binary_structure(2, 1)


class ChestCTs(NamedTuple):
    """Volumes sorted by whether they look like chest CT.

    Args:
        used: those to go on with.
        refused: those not, each with its reason.
        doubts: what is wrong with volumes that are used by force.
        sha256: of the files of each volume that is used.
    """

    used: list[CTSource]
    refused: list[RejectedVolume]
    doubts: dict[str, list[str]]
    sha256: dict[str, str]


def chest_doubts(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> list[str]:
    """Say what makes a volume unlike a CT of a chest.

    Slices, extents and units are looked at first: lungs are searched only where those are right. Lung is air
    that tissue surrounds in its slice.

    Args:
        hu: canonical slices in HU.
        spacing_mm: (x, y, z).

    Shape:
        ``hu (Z, H, H)``.

    Returns:
        A sentence for each doubt, with what was expected; none for a chest.

    Example:
        >>> chest_doubts(np.full((3, 400, 400), -1000), (1.0, 1.0, 5.0))
        ['it must have at least 20 slices, got 3', 'slices must span 150 to 700 mm, got 15 mm']
    """
    x, y, z = spacing_mm
    height_mm, width_mm = len(hu) * z, hu.shape[-1] * x
    doubts = []
    if len(hu) < MIN_SLICES:
        doubts.append(f"it must have at least {MIN_SLICES} slices, got {len(hu)}")
    for name, mm, (low, high) in (("slices", height_mm, HEIGHT_MM), ("a slice", width_mm, WIDTH_MM)):
        if not low <= mm <= high:
            doubts.append(f"{name} must span {low:.0f} to {high:.0f} mm, got {mm:.0f} mm")
    if doubts:
        return doubts
    steps = [max(1, int(look / mm)) for look, mm in zip(LOOK_MM, (z, y, x), strict=True)]
    few = hu[:: steps[0], :: steps[1], :: steps[2]]
    doubts = _unit_doubts(few)
    if doubts:
        return doubts
    lung_cm2 = _enclosed_lung(few).sum((1, 2)) * steps[1] * y * steps[2] * x / 100
    lung_mm = np.count_nonzero(lung_cm2 >= MIN_LUNG_CM2) * steps[0] * z
    if lung_mm < MIN_LUNG_MM:
        return [f"lungs must show over at least {MIN_LUNG_MM:.0f} mm of its height, got {lung_mm:.0f} mm"]
    return []


def _unit_doubts(hu: np.ndarray) -> list[str]:
    air, dense = (hu <= AIR_HU).mean(), (hu > DENSE_HU).mean()
    tissue = ((hu >= TISSUE_HU[0]) & (hu <= TISSUE_HU[1])).mean()
    found = (
        (
            air < MIN_AIR,
            f"at least {MIN_AIR:.0%} of voxels must be air, {AIR_HU:.0f} HU or less, got {air:.1%}",
        ),
        (
            tissue < MIN_TISSUE,
            f"at least {MIN_TISSUE:.0%} of voxels must be soft tissue, {TISSUE_HU[0]:.0f} to "
            f"{TISSUE_HU[1]:.0f} HU, got {tissue:.1%}",
        ),
        (
            dense > MAX_DENSE,
            f"at most {MAX_DENSE:.0%} of voxels may be bone, above {DENSE_HU:.0f} HU, got {dense:.1%}",
        ),
    )
    return [f"{text}: values seem not to be HU" for is_wrong, text in found if is_wrong]


def _enclosed_lung(hu: np.ndarray) -> np.ndarray:
    """Mark air of lung density that no path of air within its slice joins to the slice's edge."""
    air = hu < LUNG_HU[1]
    regions, _ = ndimage.label(air, structure=WITHIN_SLICES)
    edges = (regions[:, 0], regions[:, -1], regions[:, :, 0], regions[:, :, -1])
    open_to_edge = np.unique(np.concatenate([edge.ravel() for edge in edges]))
    return (hu >= LUNG_HU[0]) & air & ~np.isin(regions, open_to_edge)


def chest_cts(sources: Sequence[CTSource], num_workers: int, force: bool) -> ChestCTs:
    """Read all volumes and refuse those that do not look like chest CT, or cannot be read.

    Args:
        sources: volumes.
        num_workers: threads that read, a volume each.
        force: use what does not look like a chest CT nonetheless; what cannot be read stays refused.
    """
    sorted_cts = ChestCTs([], [], {}, {})
    with ThreadPoolExecutor(max(num_workers, 1), "check_ct") as pool:
        for source, (doubts, failure, sha256) in zip(sources, pool.map(_looked_at, sources), strict=True):
            if failure is not None:
                sorted_cts.refused.append(failure)
            elif doubts and not force:
                sorted_cts.refused.append(RejectedError(NOT_CHEST_CT, "; ".join(doubts)).of(source.volume))
            else:
                sorted_cts.used.append(source)
                sorted_cts.sha256[source.volume] = sha256
                if doubts:
                    sorted_cts.doubts[source.volume] = doubts
    return sorted_cts


def _looked_at(source: CTSource) -> tuple[list[str], RejectedVolume | None, str]:
    """Doubts about a volume, why it cannot be read, and the digest of its files."""
    try:
        ct = source.read()
    except RejectedError as error:
        return [], error.of(source.volume), ""
    except (OSError, ValueError) as error:
        return [], RejectedError("unreadable", str(error)).of(source.volume), ""
    return chest_doubts(ct.hu, ct.spacing_mm), None, ct.sha256
