"""Is a volume what it should be: a CT in HU, of a whole chest, the right way up, without blank slices?

The only place for these questions: readers refuse what is not in HU, ``predict`` also what is no upright
whole chest; inference and data_prep list what is doubtful, and the audit reads the same answers off shards.
Questions and bounds are the rows of ``chest_rules.csv``; ``docs/checks.md`` shows what they say about scans.

Shapes: Z slices, H rows, W columns of a volume, canonical; N values.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
from common.ct.geometry import CT
from common.ct.rejection import Doubt, RejectedError

INF = math.inf

TISSUE_HU = (-200, 300)
"""Fat, muscle, blood."""

MIN_LUNG_CM2 = 30.0
"""Lung in a slice that counts towards the lungs' height."""

MIN_PADDED = 0.01
"""Share of the voxels at one value that makes it padding, if only padding is lower: noise spreads air."""

PADDED_WIDTH_HU = 5
"""How far padding that was resampled strays from its value. Seen: 3 HU."""

MIN_BODY, BODY_HU = 0.001, -500
"""A slice with a smaller share of voxels above this is air alone."""


class Rule(NamedTuple):
    """One question about a volume, by the name of a measure: what holds for a sound one, and its range.

    Args:
        low, high: least and greatest value of a sound volume; ``too_low`` and ``too_high`` explain others.
        refused: whether ``predict`` refuses a volume outside the range; doubts are only listed.
    """

    name: str
    claim: str
    measure: str
    unit: str = ""
    low: float = -INF
    high: float = INF
    too_low: str = ""
    too_high: str = ""
    refused: bool = True


def _read_rules() -> list[tuple[str, Rule]]:
    """Read the rules, each with its verdict: ``not HU``, ``refused`` or ``doubt``."""
    rules = []
    with Path(__file__).with_name("chest_rules.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            verdict = row.pop("verdict")
            low, high = float(row.pop("low") or -INF), float(row.pop("high") or INF)
            rules.append((verdict, Rule(**row, low=low, high=high, refused=verdict != "doubt")))
    return rules


_RULES = _read_rules()

HU_RULES = tuple(rule for verdict, rule in _RULES if verdict == "not HU")
"""A volume that breaks one of these is no CT in HU, and is not read."""

CHEST_RULES = tuple(rule for _, rule in _RULES if rule.name != "highest")
"""What is asked of the slices, whose values are clipped."""


def judge(measures: Mapping[str, float], rules: Sequence[Rule] = CHEST_RULES) -> list[Doubt]:
    """Compare measures with their ranges.

    Args:
        measures: values by name of the rule; NaN or absent where a question does not apply.
        rules: the questions.

    Example:
        >>> [doubt.text for doubt in judge({"back": 0.21, "lungs": 180, "heart": math.nan})]
        ['the spine is in front: ... (place of the spine, 0 front to 1 back: 0.21, expected at least 0.5)']
    """
    doubts = []
    for rule in rules:
        value = measures.get(rule.name, math.nan)
        if value < rule.low or value > rule.high:
            why = rule.too_low if value < rule.low else rule.too_high
            unit = f" {rule.unit}" if rule.unit else ""
            text = f"{why} ({rule.measure}: {value:.4g}{unit}, expected {_range(rule)})"
            doubts.append(Doubt(rule.name, text, rule.refused))
    return doubts


def _range(rule: Rule) -> str:
    if rule.low == -INF:
        return f"at most {rule.high:g}"
    return f"at least {rule.low:g}" if rule.high == INF else f"{rule.low:g} to {rule.high:g}"


def check_ct(ct: CT) -> CT:
    """Refuse what is no CT in HU, and return a CT with what makes it unlike an upright whole chest."""
    check_hu(ct)
    doubts, blank = find_doubts(ct.hu, ct.spacing_mm)
    return ct._replace(doubts=doubts, blank=blank)


def check_hu(ct: CT) -> None:
    """Refuse what is no CT in HU by the values before the clip, padding left out.

    Such are masks, other modalities, pictures, values without their rescale or rescaled twice.
    """
    doubts = judge({"highest": ct.values.highest, **_measure_values(ct.values.sample)}, HU_RULES)
    if doubts:
        text = "; ".join(doubt.text for doubt in doubts)
        raise RejectedError("not in HU", f"{text}. Pass the scan itself, rescaled to HU once, and no mask.")


def find_doubts(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[list[Doubt], list[int]]:
    """Say what makes a volume unlike an upright CT of a whole chest in HU, and which of its slices are blank.

    Args:
        hu: ``(Z, H, W)`` canonical slices in HU, as shards keep them, not padded to squares.
        spacing_mm: as (x, y, z).

    Example:
        >>> doubts, blank = find_doubts(np.full((3, 400, 400), -1000), (1.0, 1.0, 5.0))
        >>> [doubt.rule for doubt in doubts], blank
        (['tissue', 'grey_levels', 'slices', 'length', 'blank'], [0, 1, 2])
    """
    blank = blank_slices(hu)
    return judge(measure(coarse_grid(hu, spacing_mm), hu.shape, spacing_mm, len(blank))), blank


def blank_slices(hu: np.ndarray) -> list[int]:
    """List the slices of ``hu (Z, H, W)`` that are air alone, or of one value but for padding."""
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

    The grid is that of ``coarse_grid``; shape ``(Z, H, W)`` and spacing (x, y, z) are those of the volume.
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
    """Count the voxels at each whole HU of ``values (N,)``, low to high, without padding around the image.

    Padding is a lowest value that many voxels share. Where there is nothing else, it is an image.

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
