"""Files that are there in full or not at all."""

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def write_figure(path: str | Path, figure: "Figure", dpi: int = 120) -> None:
    """Write a figure as PNG, which appears only when whole; its folder is made where it is missing.

    Args:
        path: PNG to write.
        figure: what to write.
        dpi: dots per inch.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


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


logger = logging.getLogger(__name__)

LOCK = ".lock"
MAX_COMMAND_CHARS = 120

_for_good = ExitStack()
_held: set[Path] = set()  # of this process, which its own locks would not keep out


def claim(folder: str | Path) -> None:
    """Keep other runs out of a folder until this process ends, however it ends.

    With several ranks (torchrun) rank 0 claims it for all of them.

    Args:
        folder: folder the run writes to, made when missing.

    Raises:
        BlockingIOError: if another process has claimed it; says which.
    """
    if os.environ.get("RANK", "0") == "0" and Path(folder).resolve() / LOCK not in _held:
        _for_good.enter_context(claimed(folder))


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder for as long as the block runs.

    The lock ends with the process, killed or not, and is not its children's. On a file system without locks
    nobody is kept out.

    Args:
        folder: made when missing.

    Raises:
        BlockingIOError: if another process has claimed it; says which.
    """
    path = Path(folder).resolve() / LOCK
    if path in _held:
        raise _in_use(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows both
            raise _in_use(path) from error
        except OSError as error:
            logger.warning("Cannot lock '%s' (%s): keep other runs out yourself.", path.parent, error)
        file.truncate(0)
        json.dump(_me(), file)
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
            file.truncate(0)


def _me() -> dict[str, str | int]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:MAX_COMMAND_CHARS]
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def _in_use(path: Path) -> BlockingIOError:
    who = _holder(path)
    return BlockingIOError(
        f"Folder '{path.parent}' is in use by {who}. Wait for it, stop it, or write elsewhere."
    )


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        other = json.loads(path.read_text(encoding="utf-8"))
        return "process {pid} on {host} since {since} ({command})".format_map(other)
    return "another process"


def must_exist(**paths: str | Path | None) -> None:
    """Refuse inputs of a bundle that are not there.

    Args:
        paths: option to its file or folder; None for one that is not used.

    Raises:
        FileNotFoundError: if one does not exist.

    Example:
        >>> must_exist(dataset_dir=".", skip_list=None)
    """
    for option, path in paths.items():
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(
                f"Cannot find {option}: '{path}' does not exist. Pass another --{option}."
            )
