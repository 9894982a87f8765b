"""Says what a DICOM file is, and sorts files into axial CT series and what is none."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydicom import FileDataset
from pydicom.uid import UID

from common.ct.dicom_header import FRAME_TAGS, elements_start, frame_values, parse
from common.ct.rejection import NOT_AXIAL_CT, RejectedError, RejectedVolume

AXIAL_CT = "axial CT"
LOCALIZER = "CT localizer"
REFORMAT = "CT of another plane"
DERIVED = "CT computed from slices"
NO_IMAGE = "no DICOM image"
DAMAGED = "damaged"

# CT Image Storage, Enhanced CT Image Storage, Legacy Converted Enhanced CT Image Storage.
CT_CLASSES = {"1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"}
DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
PLANE_TAGS = ("ImageOrientationPatient", "ImagePositionPatient")
TAGS = (
    *("SOPClassUID", "Modality", "SeriesInstanceUID", "StudyInstanceUID", "FileSetID"),
    *("ImageType", "VolumeBasedCalculationTechnique", *PLANE_TAGS, *FRAME_TAGS),
)
DESCRIBED_BY = ("StudyInstanceUID", "SeriesDescription", "ConvolutionKernel")
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
SERIES_UID = re.compile(r"[0-9][0-9.]{0,63}")
COMPUTED = re.compile(
    r"\b(M(IN|AX|EAN)?|AVG) ?IP\b|\bCURVED ?MPR\b|PROJECT|RENDER|\b(VRT|SSD|SCREEN ?SAVE)\b"
)
"""In ImageType, or what Enhanced CT was computed by: projections, curved reformats, renderings, screens.

Flat reformats are none of these: scanners mark thick axial slices made from thin ones as MPR."""


class FoundFile(NamedTuple):
    """A file that was looked at.

    Args:
        path: path of the file.
        kind: ``axial CT``, what else it is, or ``damaged``.
        series: SeriesInstanceUID, empty where the file has none.
        study: StudyInstanceUID, empty where the file has none.
        places: where each image of an axial CT lies, as far as the header says.
        damage: what is wrong with a damaged file.
    """

    path: Path
    kind: str
    series: str = ""
    study: str = ""
    places: tuple[str, ...] = ()
    damage: str = ""

    def shown_as(self, path: Path) -> "FoundFile":
        """Return the same with another path, also in what is wrong."""
        return self._replace(path=path, damage=self.damage.replace(str(self.path), str(path)))


def look_at(path: Path) -> FoundFile:
    """Say what a file is, from its content; files without a preamble are known by their first element."""
    try:
        with path.open("rb") as file:
            is_dicom = elements_start(file) is not None
        if not is_dicom and path.suffix.lower() not in DICOM_SUFFIXES:
            return FoundFile(path, NO_IMAGE)
        dataset = parse(path, stop_before_pixels=True, specific_tags=[*TAGS])
        # Tools for anonymising blank the class in the dataset and leave it in the file's meta information.
        sop_class = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
        if sop_class == DIRECTORY_CLASS or "FileSetID" in dataset:
            return FoundFile(path, NO_IMAGE)
        if not ({"SOPClassUID", "Modality"} & set(dataset.dir()) or sop_class):
            raise RejectedError("unreadable", f"Cannot read '{path}' as DICOM: it has no SOPClassUID.")
        kind, places = _kind(dataset, sop_class, path)
    except (RejectedError, OSError) as error:
        damage = error.detail if isinstance(error, RejectedError) else str(error)
        return FoundFile(path, DAMAGED, damage=damage)
    series, study = (str(dataset.get(f"{of}InstanceUID") or "").strip() for of in ("Series", "Study"))
    return FoundFile(path, kind, series, study, places)


def look_at_each(paths: Sequence[Path]) -> Iterable[FoundFile]:
    """Look at files, one after another."""
    return map(look_at, paths)


def _kind(dataset: FileDataset, sop_class: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the kind of a file, and of axial CT where its images lie."""
    modality = str(dataset.get("Modality") or "unknown modality")
    if sop_class not in CT_CLASSES and (sop_class or modality != "CT"):
        return UID(sop_class).name or modality, ()
    stated = f"{dataset.get('ImageType')} {dataset.get('VolumeBasedCalculationTechnique')}"
    image_type = stated.upper().replace("_", " ")
    if "LOCALIZER" in image_type:
        return LOCALIZER, ()
    if COMPUTED.search(image_type):
        return DERIVED, ()
    frames = frame_values(dataset, PLANE_TAGS, path)
    if not _may_be_axial(frames[0].get("ImageOrientationPatient")):
        return REFORMAT, ()
    return AXIAL_CT, tuple(_place(values) for values in frames)


def _place(values: Mapping[str, Any]) -> str:
    try:
        return " ".join(f"{float(mm):.2f}" for mm in values["ImagePositionPatient"])
    except (KeyError, TypeError, ValueError):
        return ""


def _may_be_axial(orientation: Sequence[float] | None) -> bool:
    """Tell whether slices are stacked along the body; True where a header does not say, which is an error."""
    try:
        cosines = np.array(orientation, float).reshape(2, 3)
    except (TypeError, ValueError):
        return True
    return bool(np.abs(np.cross(*cosines)).argmax() == 2)


def study_and_description(path: Path) -> tuple[str, str]:
    """Read the study that a file is of, and what its series is called: description and kernel."""
    dataset = parse(path, stop_before_pixels=True, specific_tags=[*DESCRIBED_BY])
    study, *described = (str(dataset.get(tag) or "").strip() for tag in DESCRIBED_BY)
    return study, " ".join(" ".join(described).split())


def sort_series(
    found: Iterable[FoundFile],
) -> tuple[list[tuple[str, tuple[Path, ...]]], list[RejectedVolume]]:
    """Sort files into axial CT series, what is none, and what is damaged.

    Files of one SeriesInstanceUID belong together wherever they lie; files without one are a series per
    folder. Left out as ``not an axial CT``, which is no failure: scouts, reformats, projections, other
    modalities, several images at one or two places, as of bolus tracking, and single images of a study that
    has other series. If most series of a study are single images, its series were torn apart, and each stays
    to fail when it is read.

    Returns:
        Names and files of the series in the order of their first files' paths, and what was left out.
    """
    by_series: dict[str, list[FoundFile]] = {}
    rejected = []
    for file in sorted(found, key=lambda file: file.path):
        if file.kind == DAMAGED:
            rejected.append(RejectedError("unreadable", file.damage).of(file.path.name))
        elif file.kind != NO_IMAGE:
            by_series.setdefault(file.series or file.path.parent.as_posix(), []).append(file)
    studies = Counter(files[0].study for files in by_series.values())
    singles = Counter(files[0].study for files in by_series.values() if _is_single(files))
    series = []
    for uid, files in by_series.items():
        study = files[0].study
        is_beside_others = _is_single(files) and 2 * singles[study] <= studies[study]
        what = "a single image of a study of several series" if is_beside_others else _left_out(files)
        if what:
            folder = Path(os.path.commonpath([file.path.parent for file in files])).as_posix()
            detail = f"a series must hold axial CT, got files in '{folder}': {what}"
            rejected.append(RejectedError(NOT_AXIAL_CT, detail).of(series_volume(uid)))
        else:
            series.append((series_volume(uid), tuple(file.path for file in files if file.kind == AXIAL_CT)))
    return series, rejected


def _is_single(files: Sequence[FoundFile]) -> bool:
    return sum(len(file.places) for file in files) == 1


def _left_out(files: Sequence[FoundFile]) -> str:
    """Say why a series is no axial CT; nothing where it is one."""
    places = [place for file in files for place in file.places]
    if not places:
        kinds = Counter(file.kind for file in files)
        return ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    num_places = len(set(places))
    if "" in places or num_places > 2 or len(places) == num_places:
        return ""
    where = "one position" if num_places == 1 else "two positions"
    return f"{len(places)} images at {where}, as of bolus tracking"


def series_volume(series: str) -> str:
    """Return the name of a series: its UID with ``_`` for dots, or a checksum of its own name."""
    if SERIES_UID.fullmatch(series):
        return series.replace(".", "_")
    return f"series_{hashlib.sha256(series.encode(errors='surrogatepass')).hexdigest()[:16]}"
