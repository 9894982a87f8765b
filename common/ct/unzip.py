"""Unpack archives that somebody else made: nothing leaves the folder, nothing is left behind by a refusal."""

import lzma
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

MAX_BYTES = 32 * 2**30
MAX_FILES = 100_000
MAX_RATIO = 200
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

DAMAGED_ZIP = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeDecodeError),
    RuntimeError,  # encrypted, or, as NotImplementedError, of another version or compression
)
"""What reading a damaged archive raises."""


def unzip(
    archive: str | Path,
    folder: str | Path,
    max_bytes: int = MAX_BYTES,
    only: Collection[str] | None = None,
) -> list[Path]:
    """Unpack a zip file into a folder that appears only when everything in it is there and whole.

    Every name is checked before the first byte is written: absolute paths, ``..``, links and names given
    twice are refused, and so is an archive that says it holds more than ``max_bytes`` or 100,000 members, or
    that packs a file more than 200 times (the sign of a zip bomb; text and masks stay below 100) or otherwise
    than by deflate. Backslashes, as some tools write on Windows, separate folders. Checksums of the members
    are verified.

    Args:
        archive: zip file.
        folder: folder to make; it must not exist.
        max_bytes: most bytes to unpack. Our choice: 32 GiB.
        only: names of the files to unpack, such as ``a/b.txt``; None for all.

    Returns:
        The files, sorted.

    Raises:
        FileNotFoundError: if there is no such archive.
        FileExistsError: if the folder is there already.
        ValueError: if the file is no whole zip file or breaks one of the rules; nothing is left of it.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise FileNotFoundError(f"archive must be a zip file, got '{archive}', which does not exist.")
    if folder.exists():
        raise FileExistsError(f"folder must not exist yet, got '{folder}'. Delete it, or choose another.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        whole = Path(aside, "content")
        try:
            with zipfile.ZipFile(archive) as file:
                members = checked_members(file, archive, max_bytes)
                file.extractall(
                    whole,
                    [one for one in members if only is None or str(PurePosixPath(one.filename)) in only],
                )
        except DAMAGED_ZIP as error:
            raise ValueError(f"archive must be a whole zip file, got '{archive}' ({error}).") from error
        whole.mkdir(exist_ok=True)
        whole.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checked_members(file: zipfile.ZipFile, archive: Path, max_bytes: int) -> list[zipfile.ZipInfo]:
    """Return the members of an open archive, after holding each against the rules of ``unzip``.

    Args:
        file: the open archive.
        archive: its name, for messages.
        max_bytes: most bytes of all members together.

    Raises:
        ValueError: names the first member that breaks a rule.
    """
    members, seen = file.infolist(), set()
    if len(members) > MAX_FILES:
        raise ValueError(
            f"archive must hold at most {MAX_FILES:,} files, got {len(members):,} in '{archive}'."
        )
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise ValueError(f"archive must hold at most {max_bytes:,} bytes, got {total:,} in '{archive}'.")
    for member in members:
        member.filename = member.filename.replace("\\", "/")
        path = PurePosixPath(member.filename)
        if path in seen:
            raise ValueError(f"names in an archive must differ, got '{path}' twice in '{archive}'.")
        seen.add(path)
        _check_member(member, archive)
    return members


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    path = PurePosixPath(member.filename)
    outside = path.is_absolute() or ".." in path.parts or ":" in path.name
    if outside or not path.parts or "\0" in member.orig_filename:
        raise ValueError(
            f"names in an archive must stay inside it, got {member.orig_filename!r} in '{archive}'."
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"archive must hold no links, got '{member.filename}' in '{archive}'.")
    if member.compress_type not in PACKINGS:
        raise ValueError(
            f"files must be stored or deflated, got compression method {member.compress_type} for "
            f"'{member.filename}' in '{archive}'."
        )
    if member.file_size > MAX_RATIO * max(member.compress_size, 1) and member.file_size > 2**20:
        raise ValueError(
            f"files must be packed at most {MAX_RATIO} times, got {member.file_size:,} bytes out of "
            f"{member.compress_size:,} for '{member.filename}' in '{archive}'."
        )
