"""Is a volume what it should be: a CT in HU, of a whole chest, the right way up, without blank slices?

The one home of these questions: readers refuse what is not in HU, ``predict`` also what is no upright whole
chest; inference and data_prep list what is doubtful, and the audit reads the same answers off the shards.
All bounds are our choice; ``docs/checks.md`` shows what they say of real and of synthetic scans.

Shapes: Z slices, H rows, W columns of a volume, canonical; N values.
"""

import math
from collections.abc import Mapping

import numpy as np

from common.ct.anatomy import (
    PADDED_HU,
    Coarse,
    airway_at_the_top,
    coarse_grid,
    find_anatomy,
    heart_left_mm,
    lung_at_the_edges,
    lung_on_the_smaller_side,
    width_over_depth,
)
from common.ct.check_rules import HU_RULES, INF, MIN_LUNG_CM2, TISSUE_HU, Doubt, judge
from common.ct.geometry import StoredCT
from common.ct.rejection import RejectedError

MIN_PADDED = 0.01
"""Share of the voxels at one value that makes it padding, if only padding is lower: noise spreads air."""

PADDED_WIDTH_HU = 5
"""How far padding that was resampled strays from its value. Seen: 3 HU."""

MIN_BODY, BODY_HU = 0.001, -500
"""A slice with a lesser share of voxels above this is air alone."""


def check_hu(ct: StoredCT) -> None:
    """Refuse what is no CT in HU by the values before the clip, padding left out.

    Args:
        ct: as it was read.

    Raises:
        RejectedError: for masks, other modalities, pictures, values without their rescale or rescaled twice.
    """
    doubts = judge({"highest": ct.values.highest, **_measure_values(ct.values.sample)}, HU_RULES)
    if doubts:
        text = "; ".join(doubt.text for doubt in doubts)
        raise RejectedError("not in HU", f"{text}. Pass the scan itself, rescaled to HU once, and no mask.")


def find_doubts(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[list[Doubt], list[int]]:
    """Say what makes a volume unlike an upright CT of a whole chest in HU.

    Args:
        hu: canonical slices in HU, as shards keep them, not padded to squares.
        spacing_mm: as (x, y, z).

    Shape:
        ``hu (Z, H, W)``.

    Returns:
        What seems wrong, and the numbers of the blank slices from 0.

    Example:
        >>> doubts, blank = find_doubts(np.full((3, 400, 400), -1000), (1.0, 1.0, 5.0))
        >>> [doubt.rule for doubt in doubts], blank
        (['tissue', 'grey_levels', 'slices', 'length', 'blank'], [0, 1, 2])
    """
    blank = blank_slices(hu)
    return judge(measure(coarse_grid(hu, spacing_mm), hu.shape, spacing_mm, len(blank))), blank


def blank_slices(hu: np.ndarray) -> list[int]:
    """List the slices that are air alone, or of one value but for padding.

    Shape:
        ``hu (Z, H, W)``.
    """
    rows, columns = (max(1, side // 64) for side in hu.shape[1:])
    few = hu[:, ::rows, ::columns].reshape(len(hu), -1)
    is_padded = few <= PADDED_HU
    lowest = np.where(is_padded, np.iinfo(np.int16).max, few).min(1)
    is_blank = (lowest >= few.max(1)) | ((few > BODY_HU).mean(1) < MIN_BODY)
    return np.flatnonzero(is_blank).tolist()


def measure(
    grid: Coarse, shape: tuple[int, ...], spacing_mm: tuple[float, float, float], num_blank: int
) -> dict[str, float]:
    """Answer the questions of ``CHEST_RULES`` by name, each only where those before it hold.

    Args:
        grid: see ``coarse_grid``.
        shape: of the volume, (Z, H, W).
        spacing_mm: of the volume, as (x, y, z).
        num_blank: slices.
    """
    z_mm, y_mm, x_mm = (size * mm for size, mm in zip(shape, spacing_mm[::-1], strict=True))
    measures = {
        **_measure_values(grid.hu.ravel()),
        **{"slices": shape[0], "length": z_mm, "width": x_mm, "depth": y_mm, "blank": num_blank},
    }
    if _is_refused(measures):
        return measures
    anatomy = find_anatomy(grid)
    area = np.zeros(1) if anatomy is None else anatomy.lung_cm2
    measures["lungs"] = np.count_nonzero(area >= MIN_LUNG_CM2) * grid.voxel_mm[0]
    if anatomy is None or _is_refused(measures):
        return measures
    measures["lung_ends"] = float(max(area[0], area[-1]) / area.max())
    measures["lung_edges"] = lung_at_the_edges(anatomy)
    measures["shape"] = width_over_depth(anatomy)
    measures["spine"] = anatomy.spine_share
    if _is_refused(measures):
        return measures
    front, back = anatomy.box[:2]
    measures["back"] = (anatomy.spine[0] - front) / (back - front)
    measures["head"] = airway_at_the_top(anatomy)
    measures["sides"] = lung_on_the_smaller_side(anatomy)
    if not _is_refused(measures):
        measures["heart"] = heart_left_mm(anatomy)
    return measures


def _is_refused(measures: Mapping[str, float]) -> bool:
    return any(doubt.refused for doubt in judge(measures))


def _measure_values(values: np.ndarray) -> dict[str, float]:
    """Answer the questions about HU ``(N,)``, padding left out."""
    levels, counts = levels_without_padding(values)
    reached = np.cumsum(counts) / counts.sum()
    lowest, dark = (float(levels[np.searchsorted(reached, share)]) for share in (1e-4, 1e-2))
    common, edges = np.histogram(levels, np.arange(-400, 601, 20), weights=counts)

    def share(low: float, high: float) -> float:
        return float(counts[(levels >= low) & (levels <= high)].sum() / counts.sum())

    return {
        "air": lowest,
        "below_air": share(-INF, -1101),
        "tissue": share(*TISSUE_HU),
        "dense": share(601, INF),
        "dark": dark,
        "common": float(edges[common.argmax()] + 10) if common.any() else math.nan,
        "grey_levels": float(len(levels)),
    }


def levels_without_padding(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the values of voxels, without what is constant around a field of view.

    Padding is a lowest value that many voxels share. Where there is nothing else, it is an image.

    Args:
        values: HU ``(N,)``.

    Returns:
        Whole HU from low to high, and how many voxels are at each.

    Example:
        >>> levels, counts = levels_without_padding(np.array([-2000] * 5 + [24, 60, 60, 1064]))
        >>> levels.tolist(), counts.tolist()
        ([24, 60, 1064], [1, 2, 1])
    """
    whole = np.rint(values).astype(np.int64)
    counts = np.bincount(whole - whole.min())
    levels = np.flatnonzero(counts)
    levels, counts = levels + whole.min(), counts[levels]
    often = levels[counts >= MIN_PADDED * whole.size]
    if not len(often) or counts[levels < often[0] - PADDED_WIDTH_HU].sum() > MIN_PADDED * whole.size:
        return levels, counts
    inside = levels > often[0] + PADDED_WIDTH_HU
    return (levels[inside], counts[inside]) if inside.any() else (levels, counts)
