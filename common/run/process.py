"""What lets processes run side by side and be stopped at any moment: signals, whole files, folders, ranks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands of data_prep start without torch
    from ignite.engine import Engine
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


# --- signals


class Stopped(KeyboardInterrupt):
    """The user (Ctrl-C) or the cluster (SIGTERM) has asked this process to end.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}.")
        self.exit_status = 128 + number


def raise_stopped(number: int) -> None:
    """Raise :class:`Stopped` in the main thread; a second signal does not wait for it to tidy up."""
    on_stop(lambda again: os._exit(128 + again))
    raise Stopped(number)


def on_stop(act: Callable[[int], None]) -> None:
    """Call a function with the number of the signal when this process gets Ctrl-C or SIGTERM.

    Processes forked from this one, such as the workers of a DataLoader, ignore Ctrl-C, which a terminal sends
    to all of them: they end with this one. Outside the main thread Python allows no handlers.

    Args:
        act: called in the main thread, between two of its instructions.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            act(number)
        elif number == signal.SIGTERM:
            os._exit(128 + number)

    with suppress(ValueError):
        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)


# --- files


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb", **options: Any) -> Iterator[IO[Any]]:  # noqa: ANN401 (open's own)
    """Open a file that takes its name only once everything is written and on the disk.

    It is written aside as ``<name>.partial``. An error removes that; a killed process leaves it, and the next
    one that writes the same file replaces it. Several processes or threads that write it at once wait for
    one another, where the file system has locks.

    Args:
        path: file to write or replace; its folder must exist.
        mode: mode of ``open``, for writing.
        options: options of ``open``, such as ``newline``.
    """
    final = Path(path)
    aside = final.with_name(f"{final.name}.partial")
    try:
        with open(aside, mode, opener=_open_alone, **options) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                aside.replace(final)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno:  # a full disk names no file, and closing meets it again
            error.filename = error.filename or str(final)
        raise
    flush_folder(final.parent)


def write_figure(path: str | Path, figure: Figure, dpi: int = 120) -> None:
    """Write a figure as PNG, which appears only when whole; its folder is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def sha256_of(path: Path) -> str:
    """Return the digest of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_alone(path: str, flags: int) -> int:
    """Open a file, and empty it, once no other process or thread is writing it."""
    while True:
        descriptor = os.open(path, flags & ~os.O_TRUNC, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                return descriptor
        os.close(descriptor)  # the writer before has just given it its name


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Wait until no other process or thread is in such a block for the same file.

    Args:
        path: file that is read and written in the block; the lock lies beside it.
    """
    path = Path(path)
    with open(path.with_name(f".{path.name}.lock"), "w", opener=_open_alone):
        yield


def flush_folder(folder: Path) -> None:
    """Wait until renames in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- folders

LOCK = ".lock"
MAX_COMMAND_CHARS = 120

_for_good = ExitStack()
_held: set[Path] = set()  # by this process, which its own locks would not keep out


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

    The lock ends with the process, killed or not, and its children do not hold it. On a file system without
    locks nobody is kept out.

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
            # lockf, as its locks stay behind when this process forks the workers of a DataLoader
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows both
            raise _in_use(path) from error
        except OSError as error:
            logger.warning("Cannot lock '%s' (%s): make sure no other run writes to it.", path.parent, error)
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:MAX_COMMAND_CHARS]
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}
        file.truncate(0)
        try:
            # past the buffer, which closing would write again
            os.write(file.fileno(), json.dumps(holder).encode())
        except OSError as error:
            error.filename = str(path)  # a full disk names no file
            raise
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)
            file.truncate(0)


def _in_use(path: Path) -> BlockingIOError:
    """Say who holds a lock."""
    who = "another process"
    with suppress(OSError, ValueError, KeyError, TypeError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        who = "process {pid} on {host} since {since} ({command})".format_map(holder)
    return BlockingIOError(
        f"Folder '{path.parent}' is in use by {who}. Wait for it, stop it, or write elsewhere."
    )


# --- ranks

SET_BY_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
STEP_TIMEOUT = timedelta(hours=1)
"""How late a rank may come to a sum within a step; rank 0 may be writing a checkpoint. NCCL: 10 minutes."""

RUN_TIMEOUT = timedelta(days=7)
"""How late a rank may come to a meeting of a whole run: shares of an embedding run differ by hours."""

_meeting: Any = None  # process group of all ranks, on CPUs, for what may take RUN_TIMEOUT; None for one rank


def join_ranks() -> None:
    """Connect this process with the other ranks of its run, if it has any.

    torchrun gives ranks their numbers, or srun does where it starts the ranks itself. Under ``srun torchrun``
    SLURM's numbers are those of the launchers, and Ignite, which wants them to be the ranks', must not see
    them.
    """
    global _meeting
    if os.environ.keys() >= SET_BY_A_LAUNCHER:
        os.environ.pop("SLURM_JOB_ID", None)
    # a step's tasks, not the job's: a command of a batch script without srun is one process
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    import ignite.distributed as idist
    import torch

    idist.initialize("nccl" if torch.cuda.is_available() else "gloo", timeout=STEP_TIMEOUT)
    _meeting = torch.distributed.new_group(backend="gloo", timeout=RUN_TIMEOUT)


def wait_for_ranks() -> None:
    """Return when all ranks of the run have called this, however late."""
    gather_objects(None)


def gather_objects(item: Any) -> list[Any]:  # noqa: ANN401 (anything that can be pickled)
    """Return what each rank hands in, on every rank, when all have called this, however late.

    Args:
        item: contribution of this rank; anything that can be pickled.
    """
    import torch.distributed as dist

    _, num_ranks = rank_and_ranks()
    if num_ranks == 1:
        return [item]
    items: list[Any] = [None] * num_ranks
    dist.all_gather_object(items, item, group=_meeting)
    return items


def rank_and_ranks() -> tuple[int, int]:
    """Return the number of this process among those of the run, from 0, and how many they are.

    Example:
        >>> rank_and_ranks()
        (0, 1)
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def leave_ranks() -> None:
    """Disconnect from the other ranks, once all have come so far."""
    import ignite.distributed as idist

    wait_for_ranks()
    idist.finalize()


def end_run(written: Mapping[str, str | Path], engine: Engine | None = None) -> None:
    """End a run on every rank: rank 0 says what it wrote and where, or how far it came before it was stopped.

    Args:
        written: what the run writes, such as "encoder", to where it is.
        engine: engine that has run, if one did; :class:`common.handlers.checkpoint.Checkpoint` may have
            stopped it.

    Raises:
        SystemExit: if the run was stopped before its last step, with the status of the signal, 130 or 143.
    """
    import ignite.distributed as idist

    status = getattr(engine.state, "exit_status", 0) if engine else 0
    if idist.get_rank() == 0 and engine and status:
        logger.warning(
            "Stopped: saved step %d. Run the same command again to resume.", engine.state.iteration
        )
    elif idist.get_rank() == 0:
        logger.info("Done: %s.", ", ".join(f"{what} in '{where}'" for what, where in written.items()))
    leave_ranks()
    if status:
        sys.exit(status)
