"""Is a volume what it should be: a CT in HU, of a whole chest, the right way up, without blank slices?

The one home of these questions: readers refuse what is not in HU, ``predict`` also what is no upright whole
chest; inference and data_prep list what is doubtful, and the audit reads the same answers off the shards.
All bounds are our choice; ``docs/checks.md`` shows what they say of real and of synthetic scans.

Shapes: Z slices, H rows, W columns of a volume, canonical; N values.
"""

import math
from collections.abc import Mapping, Sequence
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

MAX_HU = 31_743
"""Highest value that scanners write, in 16 bits with the usual intercept of -1024."""

TISSUE_HU = (-200, 300)
"""Fat, muscle, blood."""

MIN_LUNG_CM2 = 30.0
"""Lung in a slice that counts towards the lungs' height."""


class Rule(NamedTuple):
    """One question about a volume, and the range of the answer for a sound one.

    Args:
        name: of the measure.
        claim: what holds for a sound volume.
        measure: what the number is.
        unit: of the number.
        low: least value of a sound volume.
        high: greatest.
        too_low: what a lesser value means.
        too_high: what a greater one means.
        refused: whether ``predict`` refuses a volume outside the range; doubts are listed only.
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


HU_RULES = (
    Rule(
        name="air",
        claim="The darkest voxels are air",
        measure="HU that 0.01 % of the voxels without padding stay below",
        unit="HU",
        high=-800,
        too_high="nothing is as dark as air: not in HU",
    ),
    Rule(
        name="below_air",
        claim="Nothing is darker than air",
        measure="share of voxels below -1100 HU without padding",
        high=0.25,
        too_high="much is darker than air: rescaled twice?",
    ),
    Rule(
        name="tissue",
        claim="Soft tissue is near 0 HU",
        measure=f"share of voxels from {TISSUE_HU[0]} to {TISSUE_HU[1]} HU without padding",
        low=0.02,
        too_low="hardly any soft tissue: not in HU, or rescaled twice?",
    ),
    Rule(
        name="dense",
        claim="Little is as dense as bone",
        measure="share of voxels above 600 HU without padding",
        high=0.25,
        too_high="too much is as dense as bone: raw values without their intercept?",
    ),
    Rule(
        name="highest",
        claim="No value is higher than scanners write",
        measure="highest value",
        unit="HU",
        high=MAX_HU,
        too_high="no CT has such values: padding taken for HU?",
    ),
)
"""What breaks one of these is no CT in HU, and is not read."""

CHEST_RULES = (
    *HU_RULES[:-1],
    Rule(
        name="dark",
        claim="Air is near -1000 HU",
        measure="HU that 1 % of the voxels without padding stay below",
        unit="HU",
        high=-850,
        too_high="little is as dark as air: HU with an offset?",
        refused=False,
    ),
    Rule(
        name="common",
        claim="The commonest tissue is near 0 HU",
        measure="commonest value from -400 to 600 HU",
        unit="HU",
        low=-160,
        high=160,
        too_low="most tissue is too dark: HU with an offset?",
        too_high="most tissue is too bright: HU with an offset?",
        refused=False,
    ),
    Rule(
        name="grey_levels",
        claim="HU are finely graded",
        measure="different values",
        low=300,
        too_low="too few grey levels: stored after windowing?",
        refused=False,
    ),
    Rule(
        name="slices",
        claim="There are slices enough for a chest",
        measure="slices",
        low=20,
        too_low="too few slices for a chest",
    ),
    Rule(
        name="length",
        claim="The scan is as long as a chest",
        measure="length from feet to head",
        unit="mm",
        low=150,
        high=700,
        too_low="too short for a whole chest",
        too_high="too long for a chest: is the slice distance right?",
    ),
    Rule(
        name="width",
        claim="The image is as wide as a chest",
        measure="width of the image",
        unit="mm",
        low=200,
        high=700,
        too_low="too narrow for a whole chest: is the pixel spacing right?",
        too_high="too wide: is the pixel spacing right?",
    ),
    Rule(
        name="depth",
        claim="The image is as deep as a chest",
        measure="depth of the image",
        unit="mm",
        low=130,
        high=700,
        too_low="too shallow for a whole chest: is the pixel spacing right?",
        too_high="too deep: is the pixel spacing right?",
    ),
    Rule(
        name="lungs",
        claim="Lungs are as long as in a whole chest",
        measure=f"height with at least {MIN_LUNG_CM2:.0f} cm2 of lung",
        unit="mm",
        low=120,
        too_low="no whole lungs: not a chest, or only part of one",
    ),
    Rule(
        name="lung_ends",
        claim="Lungs end within the scan",
        measure="lung in the first or last slice over the most in a slice",
        high=0.6,
        too_high="the lungs are cut off at the top or the bottom",
    ),
    Rule(
        name="lung_edges",
        claim="Lungs end within the image",
        measure="share of the lungs' width at the front or back edge of the image",
        high=0.3,
        too_high="the lungs are cut off in front or behind",
    ),
    Rule(
        name="shape",
        claim="The body is wider than deep",
        measure="width of the body over its depth",
        low=0.95,
        high=3.0,
        too_low="deeper than wide: half a chest, or rows and columns exchanged?",
        too_high="far wider than deep: not axial slices, or the pixel spacing is wrong?",
    ),
    Rule(
        name="spine",
        claim="A spine runs from the feet to the head",
        measure="share of slices with the spine",
        low=0.5,
        too_low="no spine runs along the slices: are they axial?",
    ),
    Rule(
        name="back",
        claim="The spine is behind",
        measure="place of the spine, 0 front to 1 back",
        low=0.5,
        too_low="the spine is in front: front and back are exchanged",
    ),
    Rule(
        name="head",
        claim="The windpipe is at the head end",
        measure="share of slices with a windpipe, upper third of the lungs less lower third",
        low=-0.2,
        too_low="the windpipe is at the foot end: head and feet are exchanged",
    ),
    Rule(
        name="sides",
        claim="There is lung on both sides of the spine",
        measure="share of the lungs on the lesser side",
        low=0.1,
        too_low="lung on one side only",
        refused=False,
    ),
    Rule(
        name="heart",
        claim="The heart is on the left",
        measure="heart left of the spine",
        unit="mm",
        low=-3,
        too_low="the heart is on the right: mirrored, or situs inversus?",
        refused=False,
    ),
    Rule(
        name="blank",
        claim="No slice is blank",
        measure="blank slices",
        high=0,
        too_high="slices without an image",
        refused=False,
    ),
)


def judge(measures: Mapping[str, float], rules: Sequence[Rule] = CHEST_RULES) -> list[Doubt]:
    """Hold measures to their ranges.

    Args:
        measures: by name of the rule; NaN or absent where a question does not apply.
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


MIN_PADDED = 0.01
"""Share of the voxels at one value that makes it padding, if only padding is lower: noise spreads air."""

PADDED_WIDTH_HU = 5
"""How far padding that was resampled strays from its value. Seen: 3 HU."""

MIN_BODY, BODY_HU = 0.001, -500
"""A slice with a lesser share of voxels above this is air alone."""


def check_ct(ct: CT) -> CT:
    """Refuse what is no CT in HU, and return a CT with what makes it unlike an upright whole chest."""
    check_hu(ct)
    doubts, blank = find_doubts(ct.hu, ct.spacing_mm)
    return ct._replace(doubts=doubts, blank=blank)


def check_hu(ct: CT) -> None:
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
