"""Finds the CT series of a folder tree of DICOM files, whatever the files are called."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.ct.dicom_files import AXIAL_CT, DAMAGED, NO_IMAGE, FoundFile, look_at, series_volume
from common.ct.nifti_file import find_nifti, only_file
from common.ct.rejection import NOT_AXIAL_CT, RejectedError, RejectedVolume
from data_prep.cluster import run_tasks
from data_prep.source_volume import SourceVolume

if TYPE_CHECKING:  # take 0.9 s to import; --help must not wait for them
    from distributed import Client

logger = logging.getLogger(__name__)

FILES_PER_TASK = 256


def find_series(
    folder: Path,
    split: str,
    client: Client,
    masks: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the axial CT series of a folder and its sub-folders.

    Every file is looked at, with or without a suffix, and belongs to the series that its header names; files
    without a SeriesInstanceUID, which some tools for anonymising blank, are one series a folder. A volume is
    called by its SeriesInstanceUID with ``_`` for each dot: it is unique, the same wherever the files lie,
    found again in any PACS or table, and tells nothing of the patient, as folders and PatientIDs may. A
    series without a proper one is called ``series_`` and 16 digits of a checksum.

    Series of another modality or plane, scouts and reports are left out as ``not an axial CT``, which is no
    failure. Files that are no DICOM images are only counted; those that should be, by suffix or first bytes,
    and cannot be read are failures of their own, for nobody knows which series lacks them.

    Args:
        folder: tree of DICOM files.
        split: to write the series as.
        client: of the Dask cluster that reads the headers.
        masks: folder of TotalSegmentator label maps in NIfTI, called as the volumes or by SeriesInstanceUID.
        progress: told of the files that were looked at.

    Returns:
        The series, and what was left out.

    Raises:
        FileNotFoundError: if the folder has no axial CT, or ``masks`` none of its series.
    """
    paths, rejected = _files(folder)
    by_series: dict[str, list[FoundFile]] = {}
    no_images = []
    for file in _look_at_all(paths, client, progress):
        if file.kind == NO_IMAGE:
            no_images.append(file.path)
        elif file.kind == DAMAGED:
            name = file.path.relative_to(folder).as_posix()
            rejected.append(RejectedError("unreadable", file.damage).of(name))
        else:
            by_series.setdefault(file.series or _common_folder([file], folder), []).append(file)
    if no_images:
        logger.info("%d files are no DICOM images, such as '%s'.", len(no_images), no_images[0])
    sources = []
    for series, files in by_series.items():
        cts = [file for file in files if file.kind == AXIAL_CT]
        if cts:
            ct, source = tuple(file.path for file in cts), _common_folder(cts, folder)
            sources.append(SourceVolume(series_volume(series), split, ct, "dicom", source=source))
        else:
            rejected.append(_left_out(series, files, folder))
    if not sources:
        raise FileNotFoundError(f"folder must hold axial CT series in DICOM, got none in '{folder}'.")
    return sources if masks is None else _with_masks(sources, masks, rejected), rejected


def _left_out(series: str, files: Sequence[FoundFile], folder: Path) -> RejectedVolume:
    kinds = ", ".join(f"{count} of {kind}" for kind, count in Counter(file.kind for file in files).items())
    detail = f"a series must hold axial CT, got files in '{_common_folder(files, folder)}': {kinds}"
    return RejectedError(NOT_AXIAL_CT, detail).of(series_volume(series))


def _files(folder: Path) -> tuple[list[Path], list[RejectedVolume]]:
    """List all files of a tree; folders that may not be read are as bad as damaged files."""
    rejected: list[RejectedVolume] = []

    def note(error: OSError) -> None:
        name = Path(error.filename).relative_to(folder).as_posix()
        rejected.append(RejectedError("unreadable", f"a folder must be readable, got {error}").of(name))

    paths = []
    for place, folders, names in os.walk(folder, onerror=note):
        paths += [Path(place, name) for name in names]
        for link in filter(os.path.islink, (os.path.join(place, name) for name in folders)):
            logger.warning("'%s' is a link to a folder and is not searched.", link)
    return sorted(paths), rejected


def _look_at_all(
    paths: Sequence[Path], client: Client, progress: Callable[[str, int, int], None]
) -> list[FoundFile]:
    """Look at files on the cluster; they come back in the order of their paths."""
    batches = [tuple(paths[i : i + FILES_PER_TASK]) for i in range(0, len(paths), FILES_PER_TASK)]
    found: list[FoundFile] = []
    for _, result in run_tasks(client, _look_at_batch, batches):
        if isinstance(result, BaseException):
            raise result
        found += result
        progress("Looking at files", len(found), len(paths))
    return sorted(found, key=lambda file: file.path)


def _look_at_batch(paths: Sequence[Path]) -> list[FoundFile]:
    return [look_at(path) for path in paths]


def _common_folder(files: Sequence[FoundFile], folder: Path) -> str:
    """Return the folder that holds all of the files, relative to the tree."""
    common = os.path.commonpath([file.path.parent for file in files])
    return Path(common).relative_to(folder).as_posix()


def _with_masks(
    sources: Sequence[SourceVolume], masks: Path, rejected: list[RejectedVolume]
) -> list[SourceVolume]:
    """Give each series the label map of its name; those with several are appended to the rejected."""
    label_maps: dict[str, list[Path]] = {}
    for name, files in find_nifti(masks).items() if masks.is_dir() else ():
        label_maps.setdefault(name.replace(".", "_"), []).extend(files)
    if not any(source.volume in label_maps for source in sources):
        raise FileNotFoundError(f"masks must hold label maps named like the series, got none in '{masks}'.")
    joined = []
    for source in sources:
        try:
            ts = only_file(label_maps[source.volume], "a label map") if source.volume in label_maps else None
        except RejectedError as error:
            rejected.append(error.of(source.volume))
        else:
            joined.append(source._replace(ts=ts))
    return joined
