"""Why a volume is left out of the shards."""

from typing import NamedTuple


class RejectedVolume(NamedTuple):
    """A volume that could not be read: the shard does without it and its index says why.

    Args:
        volume: name.
        reason: a few words that many volumes may share, to count by.
        detail: one line about this volume.
    """

    volume: str
    reason: str
    detail: str


EXCLUDED = "not a chest"
"""Reason of volumes that the dataset itself lists as no chest CT: left out, but no failure."""

NOT_AXIAL_CT = "not an axial CT"
"""Reason of DICOM series nobody meant to train on, such as scouts and reports: left out, but no failure."""


class RejectedError(ValueError):
    """A volume that must not reach a shard; caught in one place, counted and listed.

    Args:
        reason: a few words that many volumes may share, to count by.
        detail: one line about this volume.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = " ".join(detail.splitlines())  # names of files may hold ends of lines
        super().__init__(f"{reason}: {self.detail}")

    def of(self, volume: str) -> RejectedVolume:
        """Return the record of the rejection.

        Example:
            >>> RejectedError("unreadable", "the file ends early").of("train_1_a_1").reason
            'unreadable'
        """
        return RejectedVolume(volume, self.reason, self.detail)


def is_failure(rejected: RejectedVolume) -> bool:
    """Tell a volume that something is wrong with from one that was never meant to be used."""
    return rejected.reason not in (EXCLUDED, NOT_AXIAL_CT)
