"""The claims an audit proves, and the record of what held and what did not."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep.audit.measures import RULES

ERROR, WARNING = "error", "warning"

KEPT = 20
"""Offenders of a check that are kept in words; the others are counted."""


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
    """Where a check failed.

    Args:
        check: its name.
        where: a volume, a shard or a file.
        what: in words.
    """

    check: str
    where: str
    what: str


class Tally:
    """Counts what checks looked at and what failed, and keeps the first offenders of each in words."""

    def __init__(self) -> None:
        self.checked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.offences: dict[str, list[Offence]] = {}

    def saw(self, check: str, number: int = 1) -> None:
        """Note that a check looked at so many things, whatever came of it."""
        self.checked[check] += number

    def fail(self, check: str, where: str, what: str) -> None:
        """Note that one of them failed.

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
        """Take over another record."""
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
        """Whether a check failed that shards must pass."""
        return any(self.failed[name] and level == ERROR for name, level in LEVELS.items())

    def as_rows(self) -> list[Mapping[str, Any]]:
        """Return one mapping a check, in their order, for a JSON file."""
        return [
            {
                **check._asdict(),
                "status": self.status(check.name),
                "checked": self.checked[check.name],
                "failed": self.failed[check.name],
                "offenders": [
                    {"where": offence.where, "what": offence.what}
                    for offence in self.offences.get(check.name, [])
                ],
            }
            for check in CHECKS
        ]
