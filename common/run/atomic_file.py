"""Files that are there in full or not at all."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:  # noqa: ANN401 (open's own)
    """Open a file that takes its name only once everything is written and on the disk.

    It is written aside as ``<name>.partial``. An error removes that; a killed process leaves it, and the next
    one that writes the same file replaces it. Of several that write it at once, each waits for the one
    before, where the file system has locks.

    Args:
        path: the file to write or replace; its folder must exist.
        mode: of ``open``, for writing.
        options: of ``open``, such as ``newline``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(f"{folder}/table.csv", "w") as file:
        ...         _ = file.write("volume")
        ...     Path(folder, "table.csv").read_text()
        'volume'
    """
    final = Path(path)
    aside = final.with_name(f"{final.name}.partial")
    with open(aside, mode, opener=_open_alone, **options) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            aside.replace(final)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    flush_folder(final.parent)


def _open_alone(path: str, flags: int) -> int:
    """Open a file, and empty it, when no other process or thread writes it any more."""
    while True:
        descriptor = os.open(path, flags & ~os.O_TRUNC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                return descriptor
        os.close(descriptor)  # the one before has given it its name


def flush_folder(folder: Path) -> None:
    """Wait until renames in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
