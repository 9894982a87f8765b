"""What a chest CT looks like: one number for each question, and the range it has for a sound one.

The ranges are our choice. They are wide, and were set on six real scans and on synthetic ones: they are to
find what is upside down, mirrored, shuffled, in other units or no chest, not the unusual patient. A volume
outside them is shown to a person, never dropped.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

INF = math.inf


class Rule(NamedTuple):
    """One question about a volume.

    Args:
        name: of the measure and of its check.
        claim: what holds for a sound volume.
        measure: what the number is.
        unit: of the number.
        low: least value of a sound volume.
        high: greatest.
        too_low: what a lesser value means.
        too_high: what a greater one means.
    """

    name: str
    claim: str
    measure: str
    unit: str
    low: float
    high: float
    too_low: str
    too_high: str


RULES = (
    Rule(
        name="length",
        claim="The scan is as long as a chest",
        measure="length from feet to head",
        unit="mm",
        low=120,
        high=1000,
        too_low="too short for a whole chest",
        too_high="too long: is the slice distance right?",
    ),
    Rule(
        name="field",
        claim="The field of view holds a body",
        measure="field of view, geometric mean of height and width",
        unit="mm",
        low=200,
        high=700,
        too_low="too narrow: is the pixel spacing right?",
        too_high="too wide: is the pixel spacing right?",
    ),
    Rule(
        name="blank",
        claim="No slice is blank",
        measure="blank slices",
        unit="",
        low=0,
        high=0,
        too_low="",
        too_high="blank slices",
    ),
    Rule(
        name="grey_levels",
        claim="HU are finely graded",
        measure="different HU values",
        unit="",
        low=300,
        high=INF,
        too_low="too few grey levels: stored after windowing?",
        too_high="",
    ),
    Rule(
        name="air",
        claim="The darkest voxels are air",
        measure="HU that 1 % of the voxels stay below",
        unit="HU",
        low=-INF,
        high=-850,
        too_low="",
        too_high="nothing is as dark as air: not in HU, or rescaled wrongly",
    ),
    Rule(
        name="tissue",
        claim="Soft tissue is near 0 HU",
        measure="share of voxels from -150 to 150 HU",
        unit="",
        low=0.05,
        high=1,
        too_low="hardly any soft tissue: not in HU, or rescaled wrongly",
        too_high="",
    ),
    Rule(
        name="step",
        claim="Neighbouring slices resemble one another",
        measure="greatest change to either neighbour over the change between both",
        unit="",
        low=-INF,
        high=1.1,
        too_low="",
        too_high="a slice unlike both its neighbours: out of order?",
    ),
    Rule(
        name="lungs",
        claim="There are lungs",
        measure="air enclosed by the body",
        unit="L",
        low=0.8,
        high=12,
        too_low="no whole lungs: not a chest, or only part of one",
        too_high="more air than lungs hold",
    ),
    Rule(
        name="corners",
        claim="Air surrounds the body",
        measure="median HU in the corners of the slices",
        unit="HU",
        low=-INF,
        high=-700,
        too_low="",
        too_high="no air in the corners: are these axial slices?",
    ),
    Rule(
        name="width",
        claim="The body is wider than deep",
        measure="width over depth at the lungs",
        unit="",
        low=1.0,
        high=2.6,
        too_low="deeper than wide: rows and columns exchanged, or not axial?",
        too_high="far wider than deep: is the pixel spacing right?",
    ),
    Rule(
        name="spine",
        claim="The spine is at the back",
        measure="place of central bone, 0 front to 1 back",
        unit="",
        low=0.5,
        high=1,
        too_low="bone is in front: upside down, or prone and not reoriented?",
        too_high="",
    ),
    Rule(
        name="table",
        claim="The table is behind the patient",
        measure="share of matter around the body that is behind its middle",
        unit="",
        low=0.5,
        high=1,
        too_low="the table is in front: prone, or front and back exchanged?",
        too_high="",
    ),
    Rule(
        name="airway",
        claim="The windpipe is at the head end",
        measure="share of slices with a windpipe, upper third less lower third",
        unit="",
        low=-0.2,
        high=1,
        too_low="the windpipe is at the foot end: slices from head to feet?",
        too_high="",
    ),
    Rule(
        name="heart",
        claim="The heart is on the left",
        measure="heart left of the spine",
        unit="mm",
        low=-5,
        high=INF,
        too_low="the heart is on the right: mirrored, or dextrocardia?",
        too_high="",
    ),
    Rule(
        name="organs",
        claim="The label map is not empty",
        measure="share of the body that is labelled",
        unit="",
        low=0.02,
        high=INF,
        too_low="hardly anything is labelled: was the label map lost?",
        too_high="",
    ),
    Rule(
        name="organs_lungs",
        claim="Labelled lungs are dark",
        measure="median HU of labelled lungs",
        unit="HU",
        low=-INF,
        high=-400,
        too_low="",
        too_high="labelled lungs are not lung: does the label map belong to this scan?",
    ),
    Rule(
        name="organs_bones",
        claim="Labelled bones are bright",
        measure="median HU of labelled bones",
        unit="HU",
        low=100,
        high=INF,
        too_low="labelled bones are not bone: does the label map belong to this scan?",
        too_high="",
    ),
    Rule(
        name="organs_air",
        claim="Labelled solid organs are not in air",
        measure="share of labelled solid organs below -500 HU",
        unit="",
        low=-INF,
        high=0.05,
        too_low="",
        too_high="labelled organs lie in air: label map shifted, flipped or of another scan?",
    ),
    Rule(
        name="organs_head",
        claim="Labelled chest is above labelled abdomen",
        measure="chest organs above abdominal ones",
        unit="mm",
        low=0,
        high=INF,
        too_low="the chest is below the abdomen: slices from head to feet?",
        too_high="",
    ),
    Rule(
        name="organs_side",
        claim="Labelled liver is on the right",
        measure="spleen and heart left of the liver",
        unit="mm",
        low=0,
        high=INF,
        too_low="the liver is on the left: mirrored, or situs inversus?",
        too_high="",
    ),
    Rule(
        name="organs_named",
        claim="Organs named left are on the left",
        measure="organs named left, left of those named right",
        unit="mm",
        low=0,
        high=INF,
        too_low="left organs are on the right: label map and slices mirrored?",
        too_high="",
    ),
    Rule(
        name="organs_back",
        claim="Labelled spine is at the back",
        measure="spine behind heart and liver",
        unit="mm",
        low=0,
        high=INF,
        too_low="the spine is in front of the heart: front and back exchanged?",
        too_high="",
    ),
)


def reasons(measures: Mapping[str, float]) -> dict[str, str]:
    """Say what is suspicious about a volume.

    Args:
        measures: by name of the rule; NaN or absent where a question does not apply.

    Returns:
        By name of the rule, in words; empty for a sound volume.

    Example:
        >>> reasons({"spine": 0.21, "lungs": 4.6, "heart": math.nan})
        {'spine': 'bone is in front: ... (place of central bone, 0 front to 1 back: 0.21; 0.5 to 1)'}
    """
    found = {}
    for rule in RULES:
        value = measures.get(rule.name, math.nan)
        if value < rule.low or value > rule.high:
            why = rule.too_low if value < rule.low else rule.too_high
            unit = f" {rule.unit}" if rule.unit else ""
            found[rule.name] = f"{why} ({rule.measure}: {value:.3g}{unit}; {_range(rule)})"
    return found


def _range(rule: Rule) -> str:
    """State the range of a rule in words."""
    if rule.low == rule.high:
        return f"must be {rule.low:g}"
    if rule.low == -INF:
        return f"at most {rule.high:g}"
    if rule.high == INF:
        return f"at least {rule.low:g}"
    return f"{rule.low:g} to {rule.high:g}"
