"""Refuses or doubts a volume: one way to say so, to count it and to list it."""

from typing import NamedTuple

EXCLUDED = "not a chest"
"""Reason for volumes that the dataset itself lists as no chest CT: left out, but no failure."""

NOT_AXIAL_CT = "not an axial CT"
"""Reason for DICOM series nobody meant to use, such as scouts and reports: left out, but no failure."""


class RejectedVolume(NamedTuple):
    """A volume that was left out, and why: a row of ``rejected.csv``.

    Args:
        volume: name.
        reason: a few words that many volumes may share, to count by.
        detail: one line about this volume.
    """

    volume: str
    reason: str
    detail: str


class RejectedError(ValueError):
    """A volume must not be used, for a ``reason`` and with a ``detail`` as in :class:`RejectedVolume`."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = " ".join(detail.splitlines())  # file names may hold line breaks
        super().__init__(f"{reason}: {self.detail}")

    def of(self, volume: str) -> RejectedVolume:
        """Return the record of a volume that was refused for this."""
        return RejectedVolume(volume, self.reason, self.detail)


def is_failure(rejected: RejectedVolume) -> bool:
    """Tell a volume that something is wrong with from one that was never meant to be used."""
    return rejected.reason not in (EXCLUDED, NOT_AXIAL_CT)


class Doubt(NamedTuple):
    """What seems wrong with a volume.

    Args:
        rule: name of the question, see :data:`common.ct.checks.CHEST_RULES`.
        text: what seems wrong, with the measure and its range.
        refused: whether ``predict`` refuses the volume for it.
    """

    rule: str
    text: str
    refused: bool
