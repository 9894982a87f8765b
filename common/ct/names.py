"""The one rule for names: what the volume of a file is called, and which volume a list or table means."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
