"""What an audit checks, of shards and of the volumes in them, and the record of the outcome."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from common.ct.checks import CHEST_RULES, Rule

ERROR, WARNING = "error", "warning"

KEPT = 20
"""Offenders of a check that are described; the others are only counted."""


RULES = (
    *CHEST_RULES,
    Rule(
        name="step",
        claim="Neighbouring slices resemble one another",
        measure="greatest change to either neighbour over the change between both",
        high=1.1,
        too_high="a slice unlike both its neighbours: out of order?",
    ),
    Rule(
        name="organs",
        claim="The label map is not empty",
        measure="share of the body that is labelled",
        low=0.02,
        too_low="hardly anything is labelled: was the label map lost?",
    ),
    Rule(
        name="organs_lungs",
        claim="Labelled lungs are dark",
        measure="median HU of labelled lungs",
        unit="HU",
        high=-400,
        too_high="labelled lungs are not lung: does the label map belong to this scan?",
    ),
    Rule(
        name="organs_bones",
        claim="Labelled bones are bright",
        measure="median HU of labelled bones",
        unit="HU",
        low=100,
        too_low="labelled bones are not bone: does the label map belong to this scan?",
    ),
    Rule(
        name="organs_air",
        claim="Labelled solid organs are not in air",
        measure="share of labelled solid organs below -500 HU",
        high=0.05,
        too_high="labelled organs lie in air: label map shifted, flipped or of another scan?",
    ),
    Rule(
        name="organs_head",
        claim="Labelled chest is above labelled abdomen",
        measure="chest organs above abdominal ones",
        unit="mm",
        low=0,
        too_low="the chest is below the abdomen: slices from head to feet?",
    ),
    Rule(
        name="organs_side",
        claim="Labelled liver is on the right",
        measure="spleen and heart left of the liver",
        unit="mm",
        low=0,
        too_low="the liver is on the left: mirrored, or situs inversus?",
    ),
    Rule(
        name="organs_named",
        claim="Organs named left are on the left",
        measure="organs named left, left of those named right",
        unit="mm",
        low=0,
        too_low="left organs are on the right: label map and slices mirrored?",
    ),
    Rule(
        name="organs_back",
        claim="Labelled spine is at the back",
        measure="spine behind heart and liver",
        unit="mm",
        low=0,
        too_low="the spine is in front of the heart: front and back exchanged?",
    ),
)
"""What is asked of each chest CT: ``common.ct.checks``, the order of its slices, its label map.

The ranges are our choice. They are wide, and were set on six real scans and on synthetic ones: they should
find what is shuffled or does not belong together, not the unusual patient. A volume outside them is shown to
a person, never dropped.
"""


class Check(NamedTuple):
    """A claim about the shards.

    Args:
        name: one word, for machines.
        level: ``error`` if the shards cannot be trusted where it fails, ``warning`` if a person should look.
        claim: what holds where it passes.
    """

    name: str
    level: str
    claim: str


CHECKS = (
    Check("index", ERROR, "Every shard has a readable index of this schema, and its tar the size it states"),
    Check("members", ERROR, "The tar holds what the index says, where it says, and nothing else"),
    Check("checksums", ERROR, "Every member has the bytes that were written"),
    Check("order", ERROR, "Slices follow one another from the feet to the head; no volume is split"),
    Check("unique", ERROR, "A volume lies in one shard"),
    Check("records", ERROR, "The record of every slice agrees with the index"),
    Check("ct", ERROR, "CT slices decode to 16-bit HU of the stated size, within the stored range"),
    Check("masks", ERROR, "Masks decode to known ids and findings, those that index and record announce"),
    Check("manifest", ERROR, "manifest.csv lists the volumes of the shards, and they alone, as they are"),
    Check("rejected", ERROR, "manifest.csv, rejected.csv and the shards agree on what was left out"),
    Check("labels", ERROR, "All volumes are labelled for the same classes"),
    Check("leak", ERROR, "No CT is in two splits"),
    Check("duplicates", WARNING, "No CT is there twice under two names"),
    Check("leftovers", WARNING, "The folder holds no unfinished or foreign files"),
    Check("unlabelled", WARNING, "Every volume has labels, or none has"),
    Check("outliers", WARNING, "No volume stands far apart from the others"),
    *(Check(rule.name, WARNING, rule.claim) for rule in RULES),
)
LEVELS = {check.name: check.level for check in CHECKS}


class Offence(NamedTuple):
    """Where a check failed: its name; a volume, shard or file; what is wrong with it, in words."""

    check: str
    where: str
    what: str


class Tally:
    """Counts what checks looked at and what failed, and describes the first offenders of each."""

    def __init__(self) -> None:
        self.checked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.offences: dict[str, list[Offence]] = {}

    def saw(self, check: str, number: int = 1) -> None:
        """Count things that a check looked at, whatever the outcome."""
        self.checked[check] += number

    def fail(self, check: str, where: str, what: str) -> None:
        """Record that one of them failed.

        Example:
            >>> tally = Tally()
            >>> tally.saw("ct", 300)
            >>> tally.fail("ct", "train_1_a_1", "slice 7: is empty")
            >>> tally.failed["ct"], tally.status("ct"), tally.status("masks")
            (1, 'failed', 'not applicable')
        """
        self.failed[check] += 1
        kept = self.offences.setdefault(check, [])
        if len(kept) < KEPT:
            kept.append(Offence(check, where, what))

    def add(self, other: "Tally") -> None:
        """Add another record to this one."""
        self.checked += other.checked
        self.failed += other.failed
        for check, offences in other.offences.items():
            kept = self.offences.setdefault(check, [])
            kept += offences[: KEPT - len(kept)]

    def status(self, check: str) -> str:
        """Return ``passed``, ``failed``, or ``not applicable`` where there was nothing to look at."""
        if self.failed[check]:
            return "failed"
        return "passed" if self.checked[check] else "not applicable"

    @property
    def has_errors(self) -> bool:
        """Whether the shards cannot be trusted."""
        return any(self.failed[name] and level == ERROR for name, level in LEVELS.items())

    def as_rows(self) -> list[Mapping[str, Any]]:
        """Return one mapping per check, in their order, for a JSON file."""
        return [
            {
                **check._asdict(),
                "status": self.status(check.name),
                "checked": self.checked[check.name],
                "failed": self.failed[check.name],
                "offenders": [
                    {"where": where, "what": what} for _, where, what in self.offences.get(check.name, [])
                ],
            }
            for check in CHECKS
        ]
