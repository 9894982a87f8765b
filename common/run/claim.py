"""One run per folder: a second one is refused, and told who is there."""

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
