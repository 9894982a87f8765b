"""Finds the CT volumes of a file, folder or zip of any format, by name and content; names and reads them."""

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from common.ct import dicom, nifti, npz
from common.ct.checks import check_ct
from common.ct.dicom_files import NO_IMAGE, FoundFile, look_at_each, sort_series, study_and_description
from common.ct.geometry import CT, Grid
from common.ct.itk import open_itk
from common.ct.nifti import Rescale, VolumeFile, open_nifti
from common.ct.rejection import RejectedError, RejectedVolume
from common.ct.unzip import unzipped

logger = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
VOLUME_SUFFIXES = (*IMAGE_SUFFIXES, ".npz")
"""Files that are a volume each, in upper or lower case."""

HEADER_SUFFIXES = (".hdr.gz", ".hdr", ".mhd", ".nhdr")
VOXEL_SUFFIXES = (".img.gz", ".img", ".raw.gz", ".raw", ".zraw")
"""Files that may hold the voxels of a header of the same name beside them."""

DROPPED_SUFFIXES = (*VOLUME_SUFFIXES, *VOXEL_SUFFIXES, ".zip")

VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
"""A dot would end a sample's key in a WebDataset tar; 80 characters fit its 100 with slice and suffix."""

SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini", "dicomdir"}
"""What operating systems and PACS put beside users' files, in lower case; hidden files are others."""

IMAGES = {
    *".img .mgz .mgh .mnc .gipl .vtk .vti .tif .tiff .npy .h5 .hdf5 .dcm .raw".split(),
    *".gz .bz2 .xz .zst .tar .tgz .7z .rar .iso".split(),
}
"""Suffixes of files that may be volumes but are not read: a warning names them."""

Look = Callable[[Sequence[Path]], Iterable[FoundFile]]
Places = Mapping[str, Path]
"""Volumes and the files or folders they are in."""


def suffix_of(name: str, suffixes: Iterable[str] = VOLUME_SUFFIXES) -> str:
    """Return the suffix that a file name ends in, in lower case; empty for any other file."""
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")


def volume_name(text: str) -> str:
    """Return the name of the volume that a file name, a path or a cell of a table means.

    Folders of either system, quotes and the suffix are dropped; dots and blanks become ``_``. A name with
    other characters, or too long for a shard, keeps what it can and takes eight digits of its checksum. It
    matches ``VOLUME_NAME`` and is the same on every machine.

    Example:
        >>> volume_name("train_fixed/train_1_a_1.nii.gz"), volume_name("1.2.840.NRRD")
        ('train_1_a_1', '1_2_840')
        >>> volume_name("Patient 01"), volume_name("Müller (1).nii")
        ('Patient_01', 'Muller_1_8a09f9fa')
    """
    name = _parts(text)[-1]
    name = unicodedata.normalize("NFC", name[: len(name) - len(suffix_of(name, DROPPED_SUFFIXES))].strip())
    plain = re.sub(r"[.\s]", "_", name)
    if VOLUME_NAME.fullmatch(plain):
        return plain
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", ascii_name).strip("_-")[:60] or "volume"
    return f"{readable}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _parts(path: str) -> list[str]:
    return path.strip(" \t\r\n\"'").replace("\\", "/").strip("/").split("/")


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name the volumes of a folder: by file, or by folder where several files have one name.

    ``s0000/ct.nii.gz`` beside ``s0001/ct.nii.gz`` is ``s0000``; where that name is taken too, ``s0000_ct``.
    Paths are relative to the folder that was searched. Two have one name only if no folder tells them apart.

    Example:
        >>> list(unique_names([Path("s0/ct.nii"), Path("s1/ct.nii"), Path("s1/a.b.mha")]).values())
        ['s0', 's1', 'a_b']
    """
    stems = {path: path.parent / volume_name(path.name) for path in paths}
    names = {stem: stem.name for stem in stems.values()}
    for longer in (lambda stem: stem.parent.name, lambda stem: "_".join(stem.parts)):
        counts = Counter(names.values())
        for stem, name in names.items():
            if counts[name] > 1 and stem.parent.name:
                names[stem] = volume_name(longer(stem))
    return {path: names[stem] for path, stem in stems.items()}


def find_named(texts: Iterable[str], places: Places) -> tuple[set[str], list[str]]:
    """Find the volumes that a list names, by path where it gives folders, else by name.

    Args:
        texts: names or paths, with or without suffix, of this or another machine; those of none are returned.
        places: volumes to choose from.
    """
    ends: dict[tuple[str, ...], str | None] = {}
    for volume, place in places.items():
        for end in _ends(place.as_posix()):
            ends[end] = None if end in ends else volume
    named = [(next(filter(None, map(ends.get, _ends(text))), volume_name(text)), text) for text in texts]
    return {name for name, _ in named if name in places}, [text for name, text in named if name not in places]


def _ends(path: str) -> list[tuple[str, ...]]:
    """Return the ends of a path that hold a folder, longest first."""
    *folders, name = _parts(path)
    parts = (*folders, volume_name(name))
    return [parts[start:] for start in range(len(folders))]


class CTFile(NamedTuple):
    """Where a volume is: plain data, which may travel to a process in another folder.

    Args:
        volume: name.
        path: its file, or folder of its series; of a zip's volume with the zip as a folder.
        files: absolute paths of its file, and of the one with its voxels if it is a header, or of the files
            of its series; of a zip's volume below the zip.
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

    def inside(self, archive: Path) -> "CTFile":
        """Return the same volume as one of a zip, which stands in its paths like a folder."""
        return self._replace(files=tuple(file.relative_to(archive) for file in self.files), archive=archive)


def ct_file(*files: Path) -> CTFile:
    """Return a volume whose file, or whose series' files, are known."""
    path = files[0] if len(files) == 1 else _common_folder(files)
    return CTFile(volume_name(path.name), path, tuple(file.absolute() for file in files))


def _common_folder(files: Iterable[Path]) -> Path:
    return Path(os.path.commonpath([file.parent for file in files]))


def open_volume(path: Path) -> AbstractContextManager[VolumeFile]:
    """Open NIfTI, MetaImage or NRRD for reading; raises RejectedError as ``open_nifti`` and ``open_itk``."""
    return open_itk(path) if suffix_of(path.name, ITK_SUFFIXES) else open_nifti(path)


def read_grid(ct: CTFile, form: str = "v2", rescale: Rescale | None = None) -> Grid:
    """Read on which grid a volume is stored, without its voxels.

    Args:
        ct: the volume.
        form: form of NIfTI, see :func:`common.ct.nifti.grid_of`.
        rescale: what a table says about NIfTI; of npz its spacing alone counts.

    Raises:
        RejectedError: if the volume must not be used.
    """
    with _files_of(ct) as paths:
        if ct.is_series:
            return dicom.read_grid(paths)
        if suffix_of(paths[0].name) == ".npz":
            return npz.read_grid(paths[0], rescale.spacing_mm[0] if rescale else npz.SPACING_MM)
        with open_volume(paths[0]) as file:
            return nifti.grid_of(file.header, form, rescale)[0]


def study_of(ct: CTFile) -> tuple[str, str]:
    """Return the study that a DICOM series is of, and what it is called; nothing for other volumes."""
    with _files_of(ct) as paths:
        return study_and_description(paths[0]) if ct.is_series else ("", "")


def read_ct(ct: CTFile, form: str = "v2", rescale: Rescale | None = None) -> CT:
    """Read a volume, refuse it if it is not in HU, and note its doubts; arguments as for ``read_grid``."""
    with _files_of(ct) as paths:
        if ct.is_series:
            return check_ct(dicom.read_ct(paths))
        if suffix_of(paths[0].name) == ".npz":
            return check_ct(npz.read_ct(paths[0], rescale.spacing_mm[0] if rescale else npz.SPACING_MM))
        with open_volume(paths[0]) as file:
            return check_ct(nifti.read_ct(file, form, rescale))


@contextmanager
def _files_of(ct: CTFile) -> Iterator[tuple[Path, ...]]:
    if ct.archive is None:
        yield ct.files
        return
    with unzipped(ct.archive, [file.as_posix() for file in ct.files]) as folder:
        try:
            yield tuple(folder / file for file in ct.files)
        except RejectedError as error:
            raise RejectedError(error.reason, error.detail.replace(str(folder), str(ct.archive))) from error


def walk(root: Path, rejected: list[RejectedVolume], leave_out: Path | None = None) -> Iterator[Path]:
    """List users' files below a folder, in the order of their names; links to folders are not followed.

    Broken links are listed as well: reading says what is wrong.

    Args:
        root: folder.
        rejected: takes in the folders that cannot be searched.
        leave_out: folder that is not searched.
    """

    def refuse(error: OSError) -> None:
        detail = f"Cannot read folder '{error.filename}': {error.strerror}."
        rejected.append(RejectedError("unreadable", detail).of(Path(error.filename).name))

    passed_over: list[str] = []
    out = leave_out and leave_out.resolve()
    for place, folders, names in os.walk(root, onerror=refuse):
        passed_over += [os.path.join(place, name) for name in (*folders, *names) if _is_systems(name)]
        folders[:] = sorted(name for name in folders if not _is_systems(name))
        for link in filter(os.path.islink, (os.path.join(place, name) for name in folders)):
            logger.warning("'%s' is a link to a folder and is not searched.", link)
        if out is not None:
            folders[:] = [name for name in folders if Path(place, name).resolve() != out]
        yield from (Path(place, name) for name in sorted(names) if not _is_systems(name))
    if passed_over:
        logger.info("Passed over %d hidden or system files, such as '%s'.", len(passed_over), passed_over[0])


def _is_systems(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def volume_files(root: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, list[Path]]:
    """List the files of one image each below a folder by volume; a warning names folders that are closed."""
    closed: list[RejectedVolume] = []
    found: dict[str, list[Path]] = {}
    for path in walk(root, closed):
        if suffix_of(path.name, suffixes):
            found.setdefault(volume_name(path.name), []).append(path)
    for folder in closed:
        logger.warning("%s", folder.detail)
    return dict(sorted(found.items()))


def only_file(files: Sequence[Path], what: str) -> Path:
    """Return the one file that has a volume's name; raise RejectedError if several ``what`` have it."""
    if len(files) > 1:
        raise _same_name(files, what)
    return files[0]


def _same_name(files: Sequence[Path], what: str) -> RejectedError:
    some = f"{len(files)} {what} have one name, such as '{files[0]}' and '{files[1]}'"
    return RejectedError("duplicate", f"{some}. Keep one, or rename.")


def find_cts(
    root: Path, look: Look | None = look_at_each, leave_out: Path | None = None
) -> tuple[list[CTFile], list[RejectedVolume]]:
    """List the volumes of a file, or of a folder and its sub-folders.

    A volume that is a file is called as ``unique_names`` says, a DICOM series by its SeriesInstanceUID.
    Hidden files, those of operating systems and whatever else is no volume are counted in the log. A zip file
    is unpacked into the folder for temporary files (``TMPDIR`` names another): here to look into it, later
    whenever one of its volumes is read. What was unpacked is removed again unless the process is killed.

    Args:
        root: file or folder.
        look: looks for DICOM in the files that are no volumes by name; None leaves DICOM out.
        leave_out: folder that is not searched.

    Returns:
        The volumes by name, and what was left out: volumes that no folder tells apart, damaged DICOM files,
        folders that cannot be searched, series that are no axial CT, and zips that are refused or in a zip.
    """
    root = root.absolute()
    rejected: list[RejectedVolume] = []
    unread: list[Path] = []
    paths = [root] if root.is_file() else list(walk(root, rejected, leave_out))
    cts = _look_into(paths, look, rejected, unread)
    for archive in filter(_is_zip, paths):
        try:
            with unzipped(archive) as folder:
                inside = list(walk(folder, rejected))
                cts += _look_into(inside, look and look_at_each, rejected, unread, (folder, archive))
        except RejectedError as error:
            rejected.append(error.of(archive.name))
            continue
        for inner in filter(_is_zip, inside):
            detail = f"'{archive}' holds another zip, '{inner.name}', which is not searched. Unpack them."
            rejected.append(RejectedError("unreadable", detail).of(inner.name))
    if unread:
        _log_unread(unread)
    base = root.parent if root.is_file() else root
    names = unique_names([ct.path.relative_to(base) for ct in cts if not ct.volume])
    named = [ct if ct.volume else ct._replace(volume=names[ct.path.relative_to(base)]) for ct in cts]
    return _once(sorted(named, key=lambda ct: (ct.volume, ct.path)), rejected), rejected


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def _look_into(
    paths: Sequence[Path],
    look: Look | None,
    rejected: list[RejectedVolume],
    unread: list[Path],
    unpacked: tuple[Path, Path] | None = None,
) -> list[CTFile]:
    """Tell files apart, which may lie in a folder unpacked from a zip; a single file has no name yet."""

    def shown(path: Path) -> Path:
        return unpacked[1] / path.relative_to(unpacked[0]) if unpacked else path

    singles, others = _single_files(paths)
    volumes = [("", tuple(map(shown, files))) for files in singles]
    if look is None:
        unread += map(shown, others)
    elif others:
        found = [file.shown_as(shown(file.path)) for file in look(others)]
        unread += [file.path for file in found if file.kind == NO_IMAGE]
        series, refused = sort_series(found)
        rejected += refused
        volumes += series
    cts = [CTFile(volume, _common_folder(files) if volume else files[0], files) for volume, files in volumes]
    return [ct.inside(unpacked[1]) for ct in cts] if unpacked else cts


def _single_files(paths: Sequence[Path]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Return the files that are a volume each, headers with their voxels; and those that may be DICOM."""

    def stem(path: Path) -> Path:
        return path.parent / volume_name(path.name)

    singles = [path for path in paths if suffix_of(path.name)]
    headers = {path for path in singles if suffix_of(path.name, HEADER_SUFFIXES)}
    voxels: dict[Path, list[Path]] = {stem(path): [] for path in headers}
    others = []
    for path in paths:
        if suffix_of(path.name, VOXEL_SUFFIXES) and stem(path) in voxels:
            voxels[stem(path)].append(path)
        elif not suffix_of(path.name) and not _is_zip(path):
            others.append(path)
    return [(path, *(voxels[stem(path)] if path in headers else ())) for path in singles], others


def _once(cts: Iterable[CTFile], rejected: list[RejectedVolume]) -> list[CTFile]:
    """Leave out volumes of one name, as nothing says which is right."""
    groups: dict[str, list[CTFile]] = {}
    for ct in cts:
        groups.setdefault(ct.volume, []).append(ct)
    for volume, some in groups.items():
        if len(some) > 1:
            rejected.append(_same_name([ct.path for ct in some], "volumes").of(volume))
    return [some[0] for some in groups.values() if len(some) == 1]


def _log_unread(paths: Sequence[Path]) -> None:
    """Log in a line how many files of which kind are no volumes."""
    kinds = Counter(path.suffix.lower() or "without suffix" for path in paths)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    level = logging.WARNING if IMAGES & kinds.keys() else logging.INFO
    logger.log(level, "Not read, as no volumes: %s, such as '%s'.", counts, paths[0])
