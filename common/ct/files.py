"""Finds the CT volumes in a file, a folder or a zip of any format, by name and content, and reads them."""

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.ct import dicom as dicom_ct
from common.ct import nifti as nifti_ct
from common.ct import npz as npz_ct
from common.ct.dicom_files import NO_IMAGE, FoundFile, look_at, sort_series
from common.ct.geometry import RejectedError, RejectedVolume, StoredCT, StoredGrid
from common.ct.names import (
    HEADER_SUFFIXES,
    VOXEL_SUFFIXES,
    only_file,
    say_unread,
    suffix_of,
    unique_names,
    volume_name,
    walk,
)
from common.ct.nifti import Rescale
from common.ct.unzip import unzip

MAX_ZIP_BYTES = 8 * 2**30
"""What a zip may hold. Our choice: 16,000 slices of 512 x 512, more than any study of a patient."""

Look = Callable[[Sequence[Path]], Iterable[FoundFile]]


class CTFile(NamedTuple):
    """A volume to be read: plain data, which may travel to another process.

    Args:
        volume: name.
        path: its file, or folder of its series; of a zip's volume with the zip as a folder.
        files: its file, before those with its voxels if it is a header, or the files of its series; of a
            zip's volume below the zip.
        archive: the zip it is in, if any.
    """

    volume: str
    path: Path
    files: tuple[Path, ...]
    archive: Path | None = None

    @property
    def is_series(self) -> bool:
        """Whether it is of DICOM files."""
        return not suffix_of(self.files[0].name)

    @property
    def on_disk(self) -> tuple[Path, ...]:
        """The files that hold it: of a zip's volume the zip."""
        return self.files if self.archive is None else (self.archive,)

    def absolute(self) -> "CTFile":
        """Return the same with absolute paths, for a process that stands in another folder."""
        if self.archive is not None:
            return self._replace(archive=self.archive.absolute())
        return self._replace(files=tuple(file.absolute() for file in self.files))


def ct_file(*files: Path) -> CTFile:
    """Return a volume whose file, or whose series' files, are known."""
    path = files[0] if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))
    return CTFile(volume_name(path.name), path, files)


def read_grid(ct: CTFile, form: str = "v2", rescale: Rescale | None = None) -> StoredGrid:
    """Read on which grid a volume is stored, without its voxels.

    Args:
        ct: the volume.
        form: of NIfTI, see :func:`common.ct.nifti.read_grid`.
        rescale: what a table says of NIfTI; of npz its spacing alone counts.

    Raises:
        RejectedError: if the volume must not be used.
    """
    with _files_of(ct) as paths:
        if suffix_of(paths[0].name) == ".npz":
            return npz_ct.read_grid(paths[0], *_edge_mm(rescale))
        return dicom_ct.read_grid(paths) if ct.is_series else nifti_ct.read_grid(paths[0], form, rescale)


def read_ct(ct: CTFile, form: str = "v2", rescale: Rescale | None = None) -> StoredCT:
    """Read a volume; arguments and errors of ``read_grid``."""
    with _files_of(ct) as paths:
        if suffix_of(paths[0].name) == ".npz":
            return npz_ct.read_ct(paths[0], *_edge_mm(rescale))
        return dicom_ct.read_ct(paths) if ct.is_series else nifti_ct.read_ct(paths[0], form, rescale)


def _edge_mm(rescale: Rescale | None) -> tuple[float, ...]:
    """Return the edge of a voxel where a table states it; nothing leaves it to the dataset's."""
    return () if rescale is None else rescale.spacing_mm[:1]


@contextmanager
def _files_of(ct: CTFile) -> Iterator[tuple[Path, ...]]:
    if ct.archive is None:
        yield ct.files
        return
    with _unzipped(ct.archive, [file.as_posix() for file in ct.files]) as folder:
        try:
            yield tuple(folder / file for file in ct.files)
        except RejectedError as error:
            raise RejectedError(error.reason, _moved(error.detail, folder, ct.archive)) from error


def look_at_each(paths: Sequence[Path]) -> Iterable[FoundFile]:
    """Look for DICOM in files, one after another."""
    return map(look_at, paths)


def find_cts(
    root: Path, look: Look | None = look_at_each, leave_out: Path | None = None
) -> tuple[list[CTFile], list[RejectedVolume]]:
    """List the volumes of a file or of a folder and its sub-folders.

    A volume that is a file is called as ``unique_names`` says, a DICOM series by its SeriesInstanceUID.
    Hidden files, those of operating systems and whatever else is no volume are counted in the log.

    A zip file is unpacked into the folder for temporary files (``TMPDIR`` names another): to look into it
    here, and, of a volume its own files alone, while that is read. The files are removed before the call
    returns, whether it succeeds or not; only a killed process leaves them.

    Args:
        root: file or folder.
        look: looks for DICOM in the files that are no volumes by name; None leaves DICOM out.
        leave_out: folder that is not searched.

    Returns:
        The volumes by name, and what was left out: volumes that no folder tells apart, damaged DICOM files,
        folders that cannot be searched, series that are no axial CT, and zips that ``unzip`` refuses, that
        hold more than 8 GiB, or another zip.
    """
    root = root.absolute()
    rejected: list[RejectedVolume] = []
    unread: list[Path] = []
    paths = [root] if root.is_file() else list(walk(root, rejected, leave_out))
    cts = _look_into(_Place(root, root), paths, look, rejected, unread)
    for archive in filter(_is_zip, paths):
        try:
            with _unzipped(archive) as folder:
                inside = list(walk(folder, rejected))
                cts += _look_into(_Place(folder, archive), inside, look and look_at_each, rejected, unread)
        except RejectedError as error:
            rejected.append(error.of(archive.name))
            continue
        for inner in filter(_is_zip, inside):
            detail = (
                f"'{archive}' holds another zip, '{inner.name}', which is not searched. Unpack '{archive}'."
            )
            rejected.append(RejectedError("unreadable", detail).of(inner.name))
    say_unread(unread)
    base = root.parent if root.is_file() else root
    names = unique_names([ct.path.relative_to(base) for ct in cts if not ct.volume])
    named = (ct if ct.volume else ct._replace(volume=names[ct.path.relative_to(base)]) for ct in cts)
    return _once(sorted(named, key=lambda ct: (ct.volume, ct.path)), rejected), rejected


class _Place(NamedTuple):
    """A folder that is looked into, and what is shown in its place: the zip that was unpacked there."""

    folder: Path
    shown: Path

    def show(self, path: Path) -> Path:
        return self.shown / path.relative_to(self.folder)

    def ct(self, volume: str, files: tuple[Path, ...]) -> CTFile:
        """Return a volume of shown files; it has no name yet if it is a file of its own."""
        path = Path(os.path.commonpath([file.parent for file in files])) if volume else files[0]
        if self.folder == self.shown:
            return CTFile(volume, path, files)
        return CTFile(volume, path, tuple(file.relative_to(self.shown) for file in files), self.shown)


def _look_into(
    place: _Place,
    paths: Sequence[Path],
    look: Look | None,
    rejected: list[RejectedVolume],
    unread: list[Path],
) -> list[CTFile]:
    """Tell files apart; what is no volume is appended to the rejected or the unread."""
    singles = [path for path in paths if suffix_of(path.name)]
    voxels: dict[Path, list[Path]] = {_stem(path): [] for path in singles if _is_header(path)}
    others = []
    for path in paths:
        if suffix_of(path.name, VOXEL_SUFFIXES) and _stem(path) in voxels:
            voxels[_stem(path)].append(path)
        elif not suffix_of(path.name) and not _is_zip(path):
            others.append(path)
    own = ((path, *(voxels[_stem(path)] if _is_header(path) else ())) for path in singles)
    cts = [place.ct("", tuple(map(place.show, files))) for files in own]
    if look is None:
        unread += map(place.show, others)
        return cts
    found = [file._replace(path=place.show(file.path)) for file in look(others)]
    unread += [file.path for file in found if file.kind == NO_IMAGE]
    series, refused = sort_series(found)
    rejected += [one._replace(detail=_moved(one.detail, place.folder, place.shown)) for one in refused]
    return cts + [place.ct(one.volume, one.files) for one in series]


def _stem(path: Path) -> Path:
    return path.parent / volume_name(path.name)


def _is_header(path: Path) -> bool:
    return bool(suffix_of(path.name, HEADER_SUFFIXES))


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def _once(cts: Sequence[CTFile], rejected: list[RejectedVolume]) -> list[CTFile]:
    """Leave out volumes of one name, as nothing says which is right."""
    paths: dict[str, list[Path]] = {}
    for ct in cts:
        paths.setdefault(ct.volume, []).append(ct.path)
    for volume, some in paths.items():
        try:
            only_file(some, "volumes")
        except RejectedError as error:
            rejected.append(error.of(volume))
    return [ct for ct in cts if len(paths[ct.volume]) == 1]


@contextmanager
def _unzipped(archive: Path, only: Collection[str] | None = None) -> Iterator[Path]:
    """Unpack a zip for as long as the ``with`` statement lasts."""
    with tempfile.TemporaryDirectory(prefix="dale-ct-") as place:
        folder = Path(place, "zip")
        try:
            unzip(archive, folder, MAX_ZIP_BYTES, only)
        except OSError as error:
            detail = (
                f"Cannot unpack '{archive}' into '{tempfile.gettempdir()}': {error.strerror}. "
                "Unpack it and pass its folder, or set TMPDIR to another place."
            )
            raise RejectedError("unreadable", detail) from error
        except ValueError as error:
            detail = f"{error} If you trust it, unpack it and pass its folder."
            raise RejectedError("unreadable", detail) from error
        yield folder


def _moved(text: str, folder: Path, shown: Path) -> str:
    return text.replace(str(folder), str(shown))
