"""Says what a file of a folder of DICOM files is, and which series it belongs to."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.ct.dicom import parse
from common.ct.rejection import NOT_AXIAL_CT, RejectedError, RejectedVolume

if TYPE_CHECKING:  # takes 0.2 s to import; --help must not wait for it
    from pydicom import FileDataset

AXIAL_CT = "axial CT"
LOCALIZER = "CT localizer"
REFORMAT = "CT of another plane"
NO_IMAGE = "no DICOM image"
DAMAGED = "damaged"

# CT Image Storage, Enhanced CT Image Storage, Legacy Converted Enhanced CT Image Storage.
CT_CLASSES = {f"1.2.840.10008.5.1.4.1.1.2{suffix}" for suffix in ("", ".1", ".2")}
DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
TAGS = ("SOPClassUID", "Modality", "SeriesInstanceUID", "ImageType", "ImageOrientationPatient")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SERIES_UID = re.compile(r"[0-9][0-9.]{0,63}")


class FoundFile(NamedTuple):
    """A file of the tree.

    Args:
        path: of the file.
        kind: ``axial CT``, what else it is, or ``damaged``.
        series: SeriesInstanceUID, empty where the file has none; of damaged files what is wrong.
    """

    path: Path
    kind: str
    series: str


def look_at(path: Path) -> FoundFile:
    """Say what a file is."""
    try:
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if not is_dicom and path.suffix.lower() not in DICOM_SUFFIXES:
            return FoundFile(path, NO_IMAGE, "")
        dataset = parse(path, path, stop_before_pixels=True, specific_tags=list(TAGS))
        if not ({"SOPClassUID", "Modality"} & set(dataset.dir())):
            raise RejectedError("unreadable", f"'{path}' must be a whole DICOM file, got no SOPClassUID")
    except (RejectedError, OSError) as error:
        return FoundFile(path, DAMAGED, error.detail if isinstance(error, RejectedError) else str(error))
    series = str(dataset.get("SeriesInstanceUID") or "").strip()
    return FoundFile(path, _kind(dataset), series)


def _kind(dataset: FileDataset) -> str:
    from pydicom.uid import UID

    # Tools for anonymising blank the class in the dataset and leave it in the file's meta information.
    sop_class = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    modality = str(dataset.get("Modality") or "unknown modality")
    if sop_class == DIRECTORY_CLASS:
        return NO_IMAGE
    if sop_class not in CT_CLASSES and (sop_class or modality != "CT"):
        return UID(sop_class).name or modality
    if "LOCALIZER" in str(dataset.get("ImageType", "")).upper():
        return LOCALIZER
    return AXIAL_CT if _may_be_axial(dataset.get("ImageOrientationPatient")) else REFORMAT


def _may_be_axial(orientation: Sequence[float] | None) -> bool:
    """Tell whether slices are stacked along the body; True where a header does not say, which is an error."""
    try:
        cosines = np.array(orientation, float).reshape(2, 3)
    except (TypeError, ValueError):
        return True
    return bool(np.abs(np.cross(*cosines)).argmax() == 2)


class Series(NamedTuple):
    """A series of axial CT slices.

    Args:
        volume: name.
        files: of its slices, in any order.
    """

    volume: str
    files: tuple[Path, ...]


def sort_series(found: Iterable[FoundFile]) -> tuple[list[Series], list[RejectedVolume]]:
    """Put files of one series together; those without one, which anonymizing blanks, are one per folder.

    Args:
        found: files that were looked at.

    Returns:
        The series of axial CT, and what was left out: other series, which is no failure, and damaged files.
    """
    rejected: list[RejectedVolume] = []
    by_series: dict[str, list[FoundFile]] = {}
    for file in sorted(found):
        if file.kind == DAMAGED:
            rejected.append(RejectedError("unreadable", file.series).of(file.path.name))
        elif file.kind != NO_IMAGE:
            by_series.setdefault(file.series or str(file.path.parent), []).append(file)
    series = []
    for uid, files in by_series.items():
        if slices := tuple(file.path for file in files if file.kind == AXIAL_CT):
            series.append(Series(series_volume(uid), slices))
        else:
            kinds = ", ".join(f"{n} of {kind}" for kind, n in Counter(file.kind for file in files).items())
            detail = f"a series must hold axial CT, got files in '{files[0].path.parent}': {kinds}"
            rejected.append(RejectedError(NOT_AXIAL_CT, detail).of(series_volume(uid)))
    return series, rejected


def series_volume(series: str) -> str:
    """Return the name of a series.

    Example:
        >>> series_volume("1.2.840.113619")
        '1_2_840_113619'
        >>> series_volume("../etc")
        'series_f7f9121fdb53d8de'
    """
    if SERIES_UID.fullmatch(series):
        return series.replace(".", "_")
    return f"series_{hashlib.sha256(series.encode()).hexdigest()[:16]}"
