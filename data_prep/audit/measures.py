"""What the audit asks of a chest CT beside ``common.ct.checks``: the order of its slices, its label map.

The ranges are our choice. They are wide, and were set on six real scans and on synthetic ones: they are to
find what is shuffled or does not belong together, not the unusual patient. A volume outside them is shown to
a person, never dropped.
"""

from common.ct.checks import CHEST_RULES, INF, Rule

RULES = (
    *CHEST_RULES,
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
