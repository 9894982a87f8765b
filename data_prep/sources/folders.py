"""Any folder of chest CTs: files in HU, or DICOM series whatever their files are called."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.ct.dicom_files import FoundFile, look_at
from common.ct.files import find_cts
from common.ct.rejection import RejectedVolume
from data_prep.cluster import ShowProgress, run_tasks
from data_prep.sources.source_volume import SourceVolume, with_masks

if TYPE_CHECKING:  # take 0.9 s to import; --help must not wait for them
    from distributed import Client


logger = logging.getLogger(__name__)

FILES_PER_TASK = 256


def find_series(
    folder: Path,
    split: str,
    client: Client,
    *,
    masks: Path | None = None,
    progress: ShowProgress = lambda stage, done, total: None,
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the axial CT series of a folder and its sub-folders.

    Every file is looked at, with or without a suffix, and belongs to the series that its header names; files
    without a SeriesInstanceUID, which some anonymising tools blank, form one series per folder. A volume is
    named by its SeriesInstanceUID with ``_`` for each dot: it is unique, the same wherever the files lie, can
    be looked up in any PACS or table, and says nothing about the patient, as folders and PatientIDs may. A
    series without a valid one is called ``series_`` and 16 digits of a checksum.

    Series of another modality or plane, scouts and reports are left out as ``not an axial CT``, which is no
    failure. Files that are not DICOM images are only counted; those that should be, by suffix or first bytes,
    and cannot be read are failures, because nobody knows which series lacks them.

    Args:
        folder: tree of DICOM files.
        split: split to write the series as.
        client: Dask cluster that reads the headers.
        masks: folder of TotalSegmentator label maps, named like the volumes or by SeriesInstanceUID.
        progress: called after every batch of files.

    Returns:
        The series, and what was left out.

    Raises:
        FileNotFoundError: if the folder is missing or has no axial CT, or ``masks`` has none of its series.
    """
    if not folder.exists():
        raise FileNotFoundError(f"No folder '{folder}'.")
    cts, rejected = find_cts(folder, look=partial(_look_at_all, client, progress), leave_out=masks)
    sources = [SourceVolume.of(ct, split, folder) for ct in cts if ct.is_series]
    if not sources:
        raise FileNotFoundError(f"No axial CT series in DICOM in '{folder}'.")
    if len(sources) < len(cts):
        logger.warning("%d volumes that are not DICOM were left out.", len(cts) - len(sources))
    return with_masks(sources, rejected, masks, "masks")


def _look_at_all(client: Client, progress: ShowProgress, paths: Sequence[Path]) -> list[FoundFile]:
    """Look at files on the cluster; the results are in the order of the paths."""
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


def find_volumes(
    folder: Path, split: str, masks: Path | None = None
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the volumes of a folder and its sub-folders; ``find_series`` is for DICOM.

    Args:
        folder: folder of volumes in HU with proper headers, one file each (see
            :func:`common.ct.files.find_cts`), or one file or zip.
        split: split to write them as.
        masks: folder of TotalSegmentator label maps with the volumes' names, which may lie in ``folder``.

    Returns:
        The volumes, and what was left out.

    Raises:
        FileNotFoundError: if the folder is missing or has no volume, or ``masks`` has none of theirs.
    """
    if not folder.exists():
        raise FileNotFoundError(f"No folder '{folder}'.")
    cts, rejected = find_cts(folder, look=None, leave_out=masks)
    if not cts and not rejected:
        raise FileNotFoundError(
            f"No volume in NIfTI, MetaImage, NRRD or npz in '{folder}'. The command dicom reads DICOM."
        )
    sources = [SourceVolume.of(ct, split, folder) for ct in cts]
    return with_masks(sources, rejected, masks, "masks")
