"""The one rule for names: what the volume of a file is called, and which volume a list or table means."""

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from common.ct.geometry import RejectedError, RejectedVolume

NIFTI_SUFFIXES = (".nii.gz", ".nii", ".hdr.gz", ".hdr")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
VOLUME_SUFFIXES = (*IMAGE_SUFFIXES, ".npz")
"""Files that are a volume each, in any case."""

HEADER_SUFFIXES = (".hdr.gz", ".hdr", ".mhd", ".nhdr")
VOXEL_SUFFIXES = (".img.gz", ".img", ".raw.gz", ".raw", ".zraw")
"""Files that may hold the voxels of a header of the same name beside them."""

DROPPED_SUFFIXES = (*VOLUME_SUFFIXES, *VOXEL_SUFFIXES, ".zip")

VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
"""A dot would end a sample's key in a WebDataset tar; 80 characters fit its 100 with slice and suffix."""

Places = Mapping[str, Path]
"""Volumes and the files or folders they are in."""


def suffix_of(name: str, suffixes: Iterable[str] = VOLUME_SUFFIXES) -> str:
    """Return the suffix that a file name ends in, in lower case; empty for any other file.

    Example:
        >>> suffix_of("SCAN.NII.GZ"), suffix_of("notes.txt")
        ('.nii.gz', '')
    """
    return next((suffix for suffix in suffixes if name.lower().endswith(suffix)), "")


def volume_name(text: str) -> str:
    """Return the name of the volume that a file name, a path or a cell of a table means.

    Folders, of either system, quotes and the suffix are dropped; dots and blanks become ``_``. A name with
    other characters, or too long for a shard, keeps what it can and takes eight digits of its checksum.

    Args:
        text: as users, tables and folders write it.

    Returns:
        A name that matches ``VOLUME_NAME`` and is the same on every machine.

    Example:
        >>> volume_name("train_fixed/train_1_a_1.nii.gz"), volume_name("1.2.840.NRRD")
        ('train_1_a_1', '1_2_840')
        >>> volume_name("Patient 01"), volume_name("Müller (1).nii")
        ('Patient_01', 'Muller_1_8a09f9fa')
    """
    name = text.strip(" \t\r\n\"'").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    name = unicodedata.normalize("NFC", name[: len(name) - len(suffix_of(name, DROPPED_SUFFIXES))].strip())
    plain = re.sub(r"[.\s]", "_", name)
    if VOLUME_NAME.fullmatch(plain):
        return plain
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", ascii_name).strip("_-")[:60] or "volume"
    return f"{readable}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name the volumes of a folder: by file, or by folder where several files have one name.

    ``s0000/ct.nii.gz`` beside ``s0001/ct.nii.gz`` is ``s0000``; where that name is taken, too, ``s0000_ct``.

    Args:
        paths: relative to the folder that was searched.

    Returns:
        Path to name. Two paths have one name only if no folder tells them apart.

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
        texts: names or paths, with or without suffix, of this or another machine.
        places: volumes to choose from.

    Returns:
        The volumes, and the texts that name none.

    Example:
        >>> places = {"s1": Path("s1/ct.nii.gz"), "a": Path("a.mha")}
        >>> found, absent = find_named(["/data/s1/ct.nii.gz", "a.nii", "b"], places)
        >>> sorted(found), absent
        (['a', 's1'], ['b'])
    """
    ends: dict[tuple[str, ...], str | None] = {}
    for volume, place in places.items():
        for end in _ends(place.as_posix()):
            ends[end] = None if end in ends else volume
    found: set[str] = set()
    absent: list[str] = []
    for text in texts:
        by_path = next(filter(None, map(ends.get, _ends(text))), None)
        named = by_path or volume_name(text)
        if named in places:
            found.add(named)
        else:
            absent.append(text)
    return found, absent


def _ends(path: str) -> list[tuple[str, ...]]:
    """Return the ends of a path that hold a folder, longest first."""
    parts = path.strip(" \t\r\n\"'").replace("\\", "/").strip("/").split("/")
    parts[-1] = volume_name(parts[-1])
    return [tuple(parts[start:]) for start in range(len(parts) - 1)]


logger = logging.getLogger(__name__)

SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini", "dicomdir"}
"""What operating systems and PACS put beside the files of users, in lower case; hidden files are others."""

IMAGES = {
    *".img .mgz .mgh .mnc .gipl .vtk .vti .tif .tiff .npy .h5 .hdf5 .dcm .raw".split(),
    *".gz .bz2 .xz .zst .tar .tgz .7z .rar .iso".split(),
}
"""Suffixes of what may be a volume, but is not read: a warning tells of it."""


def walk(root: Path, rejected: list[RejectedVolume], leave_out: Path | None = None) -> Iterator[Path]:
    """List the files of users below a folder, in the order of their names; links to folders are not followed.

    Args:
        root: folder.
        rejected: takes the folders that cannot be searched.
        leave_out: folder that is not searched.

    Yields:
        Files, broken links among them: reading says what is wrong.
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
        logger.info(
            "Passed over as hidden or of an operating system: %d, such as '%s'.",
            *(len(passed_over), passed_over[0]),
        )


def _is_systems(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def volume_files(root: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, list[Path]]:
    """List the files below a folder that are an image each, CT or label map, by the names of the files.

    Args:
        root: folder; a warning tells of sub-folders that cannot be searched.
        suffixes: of the files.

    Returns:
        Name of the volume to its files, in the order of the names.
    """
    closed: list[RejectedVolume] = []
    found: dict[str, list[Path]] = {}
    for path in walk(root, closed):
        if suffix_of(path.name, suffixes):
            found.setdefault(volume_name(path.name), []).append(path)
    for folder in closed:
        logger.warning("%s", folder.detail)
    return dict(sorted(found.items()))


def only_file(files: Sequence[Path], what: str) -> Path:
    """Return the one file of a volume.

    Args:
        files: that have the volume's name.
        what: they are, for the message.

    Raises:
        RejectedError: if there are several.
    """
    if len(files) > 1:
        raise RejectedError(
            "duplicate",
            f"{len(files)} {what} have one name, such as '{files[0]}' and '{files[1]}'. Keep one, or rename.",
        )
    return files[0]


def say_unread(paths: Sequence[Path]) -> None:
    """Tell in a line how many files of which kind are no volumes.

    Args:
        paths: of the files.
    """
    if not paths:
        return
    kinds = Counter(path.suffix.lower() or "without suffix" for path in paths)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    level = logging.WARNING if IMAGES & kinds.keys() else logging.INFO
    logger.log(level, "Not read, as no volumes: %s, such as '%s'.", counts, paths[0])
