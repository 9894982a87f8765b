"""The questions that are asked of a volume, and the range of the answer for a sound one.

All bounds are our choice; ``docs/checks.md`` shows what they say of real and of synthetic scans.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Doubt(NamedTuple):
    """What seems wrong with a volume.

    Args:
        rule: name of the question.
        text: what seems wrong, with the measure and its range.
        refused: whether ``predict`` refuses the volume for it.
    """

    rule: str
    text: str
    refused: bool


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
