"""Finds the CT volumes in a file, a folder or a zip of any format, by name and content, and reads them."""

import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.ct import dicom as dicom_ct
from common.ct import nifti as nifti_ct
from common.ct import npz as npz_ct
from common.ct.dicom_files import AXIAL_CT, DAMAGED, NO_IMAGE, FoundFile, look_at, series_volume
from common.ct.geometry import StoredCT
from common.ct.nifti_file import SUFFIXES as NIFTI_SUFFIXES
from common.ct.rejection import NOT_AXIAL_CT, RejectedError, RejectedVolume
from common.ct.unzip import unzip

logger = logging.getLogger(__name__)

SUFFIXES = (*NIFTI_SUFFIXES, ".npz")

MAX_ZIP_BYTES = 8 * 2**30
"""What a zip may hold. Our choice: 16,000 slices of 512 x 512, more than any study of a patient."""


class CTFile(NamedTuple):
    """A volume to be read.

    Args:
        volume: name.
        path: file, or folder of the series, for messages; of a zip's volume with the zip as a folder.
        read: reads it; raises ``RejectedError`` if it must not be used.
    """

    volume: str
    path: Path
    read: Callable[[], StoredCT]


class _Found(NamedTuple):
    """A volume in a folder: its name, what reads it, and its files below the folder."""

    volume: str
    read: Callable[[tuple[Path, ...]], StoredCT]
    files: tuple[Path, ...]

    def below(self, folder: Path) -> Path:
        """Return its file, or the folder of its series."""
        return folder / (self.files[0] if len(self.files) == 1 else self.files[0].parent)


def find_cts(root: Path) -> tuple[list[CTFile], list[RejectedVolume]]:
    """List the volumes of a file or of a folder and its sub-folders.

    A zip file is unpacked twice into the folder for temporary files (``TMPDIR`` names another): to look into
    it here, and, of a volume its own files alone, while that is read. Both times the files are removed before
    the call returns, whether it succeeds or not; only a killed process leaves them.

    Args:
        root: file or folder.

    Returns:
        The volumes, names given twice among them, and what was left out: damaged DICOM files, folders that
        cannot be searched, series that are no axial CT, and zips that ``unzip`` refuses, that hold more than
        8 GiB, or another zip.
    """
    volumes, zips, rejected = _look_into(root, root)
    cts = [CTFile(one.volume, one.below(root), partial(_read, root, one)) for one in volumes]
    for archive in zips:
        try:
            with _unzipped(archive) as folder:
                volumes, inner_zips, inner_rejected = _look_into(folder, archive)
        except RejectedError as error:
            rejected.append(error.of(archive.name))
            continue
        cts += [
            CTFile(one.volume, one.below(archive), partial(_read_zipped, archive, one)) for one in volumes
        ]
        rejected += inner_rejected
        for inner in inner_zips:
            detail = f"a zip must not lie in another, got '{inner.name}' in '{archive}'. Unpack '{archive}'."
            rejected.append(RejectedError("unreadable", detail).of(inner.name))
    return cts, rejected


def _look_into(root: Path, shown: Path) -> tuple[list[_Found], list[Path], list[RejectedVolume]]:
    """Tell a file, or those of a folder, apart: volumes, zips, and what must not be used.

    Names and messages have ``shown`` in place of ``root``, which may be gone when they are read.
    """
    volumes: list[_Found] = []
    zips: list[Path] = []
    rejected: list[RejectedVolume] = []
    others: dict[str, list[FoundFile]] = {}
    for path in [root] if root.is_file() else _walk(root, rejected):
        suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
        if suffix is not None:
            read = _read_npz if suffix == ".npz" else _read_nifti
            volumes.append(_Found(path.name[: -len(suffix)], read, (path.relative_to(root),)))
            continue
        if path.suffix.lower() == ".zip":
            zips.append(path)
            continue
        file = look_at(path)
        if file.kind == DAMAGED:
            rejected.append(RejectedError("unreadable", _moved(file.damage, root, shown)).of(path.name))
        elif file.kind != NO_IMAGE:
            # files without a series, which some tools for anonymising blank, are one series a folder
            others.setdefault(file.series or _moved(str(path.parent), root, shown.resolve()), []).append(file)
    for series, files in others.items():
        slices = tuple(file.path.relative_to(root) for file in files if file.kind == AXIAL_CT)
        if slices:
            volumes.append(_Found(series_volume(series), dicom_ct.read_ct, slices))
        else:
            place = _moved(str(files[0].path.parent), root, shown)
            detail = f"a series must hold axial CT, got {files[0].kind} in '{place}'"
            rejected.append(RejectedError(NOT_AXIAL_CT, detail).of(series_volume(series)))
    return volumes, zips, rejected


def _walk(root: Path, rejected: list[RejectedVolume]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        detail = f"a folder must be one that can be searched, got {error.strerror} for '{error.filename}'"
        rejected.append(RejectedError("unreadable", detail).of(Path(error.filename).name))

    for place, folders, names in os.walk(root, onerror=refuse):
        # what macOS puts into zips and onto foreign disks beside the files
        folders[:] = sorted(name for name in folders if name != "__MACOSX")
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                logger.warning("'%s' is a link to a folder and is not searched.", os.path.join(place, name))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("._"))


@contextmanager
def _unzipped(archive: Path, only: Collection[str] | None = None) -> Iterator[Path]:
    """Unpack a zip for as long as the ``with`` statement lasts."""
    with tempfile.TemporaryDirectory(prefix="dale-ct-") as place:
        folder = Path(place, "zip")
        try:
            unzip(archive, folder, MAX_ZIP_BYTES, only)
        except OSError as error:
            detail = (
                f"'{archive}' must be unpacked into '{tempfile.gettempdir()}', got {error.strerror}. "
                "Unpack it and pass its folder, or let TMPDIR name another place."
            )
            raise RejectedError("unreadable", detail) from error
        except ValueError as error:
            detail = f"{error} If you trust it, unpack it and pass its folder."
            raise RejectedError("unreadable", detail) from error
        yield folder


def _read(root: Path, volume: _Found) -> StoredCT:
    return volume.read(tuple(root / file for file in volume.files))


def _read_zipped(archive: Path, volume: _Found) -> StoredCT:
    with _unzipped(archive, [file.as_posix() for file in volume.files]) as folder:
        try:
            return _read(folder, volume)
        except RejectedError as error:
            raise RejectedError(error.reason, _moved(error.detail, folder, archive)) from error


def _moved(text: str, folder: Path, shown: Path) -> str:
    return text.replace(str(folder), str(shown))


def _read_nifti(files: tuple[Path, ...]) -> StoredCT:
    return nifti_ct.read_ct(files[0])


def _read_npz(files: tuple[Path, ...]) -> StoredCT:
    return npz_ct.read_ct(files[0])
