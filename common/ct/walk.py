"""Walks the files of a folder: the one place that says which are passed over, and what is said of them."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.ct.names import IMAGE_SUFFIXES, suffix_of, volume_name
from common.ct.rejection import RejectedError, RejectedVolume

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
