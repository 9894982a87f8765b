"""Unpacks zip files that somebody else made: nothing leaves the folder, nothing is left behind."""

import lzma
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from common.ct.rejection import RejectedError

MAX_BYTES = 8 * 2**30
"""Size of what a zip may hold. Our choice: 16,000 slices of 512 x 512, more than any study of a patient."""

MAX_FILES = 100_000

MAX_RATIO = 200
"""How far a file may be packed. More is the sign of a zip bomb; text and masks stay below 100."""

PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

DAMAGED_ZIP = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, UnicodeDecodeError),
    RuntimeError,  # encrypted, or, as NotImplementedError, of another version or compression
)
"""What reading a damaged archive raises."""


@contextmanager
def unzipped(archive: Path, only: Collection[str] | None = None) -> Iterator[Path]:
    """Unpack a zip file into a folder for temporary files, for as long as the ``with`` statement lasts.

    All names and sizes are checked before the first byte is written, checksums afterwards. Backslashes, as
    some tools write on Windows, separate folders; links are written as files of text.

    Args:
        archive: zip file.
        only: names of the files to unpack, such as ``a/b.txt``; None for all.

    Yields:
        The folder.

    Raises:
        RejectedError: if the file is damaged or breaks a rule of ``_check_members``, or there is no room.
    """
    with tempfile.TemporaryDirectory(prefix="dale-ct-") as folder:
        try:
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
                _check_members(members)
                wanted = [one for one in members if only is None or str(PurePosixPath(one.filename)) in only]
                file.extractall(folder, wanted)
        except OSError as error:
            detail = (
                f"Cannot unpack '{archive}' into '{tempfile.gettempdir()}': {error.strerror}. "
                "Unpack it and pass its folder, or set TMPDIR to another place."
            )
            raise RejectedError("unreadable", detail) from error
        except (ValueError, *DAMAGED_ZIP) as error:
            detail = f"Cannot unpack '{archive}': {error}. If you trust it, unpack it and pass its folder."
            raise RejectedError("unreadable", detail) from error
        yield Path(folder)


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    """Refuse too many or too large files, names that lead out or stand twice, bombs, and rare packings."""
    if len(members) > MAX_FILES:
        raise ValueError(f"it holds {len(members):,} files, more than {MAX_FILES:,}")
    total = sum(member.file_size for member in members)
    if total > MAX_BYTES:
        raise ValueError(f"it holds {total:,} bytes, more than {MAX_BYTES:,}")
    names = set()
    for member in members:
        member.filename = member.filename.replace("\\", "/")
        path = PurePosixPath(member.filename)
        leads_out = path.is_absolute() or ".." in path.parts or ":" in path.name
        if leads_out or not path.parts or "\0" in member.orig_filename:
            raise ValueError(f"the name {member.orig_filename!r} leads out of it")
        if path in names:
            raise ValueError(f"it holds '{path}' twice")
        names.add(path)
        if member.compress_type not in PACKINGS:
            raise ValueError(
                f"'{path}' is packed by method {member.compress_type}, neither stored nor deflated"
            )
        if member.file_size > MAX_RATIO * max(member.compress_size, 1) and member.file_size > 2**20:
            packed = f"{member.compress_size:,} bytes for {member.file_size:,}"
            raise ValueError(f"'{path}' is packed more than {MAX_RATIO} times: {packed}")
