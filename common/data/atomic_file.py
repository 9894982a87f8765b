"""Files that are there in full or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:  # noqa: ANN401 (open's own)
    """Open a file that takes its name only once everything is written and on the disk.

    It is written aside as ``<name>.partial``. An error removes that; a killed process leaves it, and the next
    one that writes the same file replaces it.

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
    try:
        with open(aside, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)
    flush_folder(final.parent)


def flush_folder(folder: Path) -> None:
    """Wait until renames in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
