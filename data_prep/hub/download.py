"""Downloads files of a dataset on the hub: several at a time, verified, and so that a rerun goes on."""

import csv
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from common.run.process import claimed
from data_prep.hub.access import explained, one_line
from data_prep.hub.files import RemoteFile
from data_prep.tables import write_table

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STATE = ".download"
"""Folder inside of the download: files under way, and the list of those that were verified."""

FAILED = "failed.csv"
READ_BYTES = 1 << 20

ShowDownload = Callable[[int, int], None]
"""Called with the files and the bytes that are done."""


class FailedFile(NamedTuple):
    """A file that was not downloaded.

    Args:
        path: in the repository.
        reason: one line.
    """

    path: str
    reason: str


class Plan(NamedTuple):
    """What a download has to do.

    Args:
        todo: files to fetch.
        num_kept: files that are there already, verified.
        num_bytes: that the files to fetch will take.
        unsafe: files whose path would lie outside of the download or on its own files.
    """

    todo: list[RemoteFile]
    num_kept: int
    num_bytes: int
    unsafe: list[FailedFile]


class StoppedError(Exception):
    """Ends the fetching of a file after the whole download has failed."""


def plan_download(files: Sequence[RemoteFile], out: Path) -> Plan:
    """Compare what is wanted with what is there.

    Args:
        files: that are wanted.
        out: folder of the download.

    Returns:
        What to do.
    """
    verified = _read_verified(out)
    todo, unsafe = [], []
    num_kept = num_bytes = 0
    for file in files:
        if not is_safe(file.path):
            unsafe.append(FailedFile(file.path, "path must stay inside of the download"))
            continue
        size = (out / file.path).stat().st_size if (out / file.path).is_file() else None
        if size == file.num_bytes and verified.get(file.path) == file.digest:
            num_kept += 1
            continue
        todo.append(file)
        num_bytes += file.num_bytes if size != file.num_bytes else 0
    return Plan(todo, num_kept, num_bytes, unsafe)


def check_room(plan: Plan, out: Path) -> int:
    """Return the bytes that are free for a download.

    Raises:
        OSError: if they are too few.
    """
    free = shutil.disk_usage(out).free
    if plan.num_bytes > free:
        raise OSError(
            f"out must have {plan.num_bytes / 1e9:,.1f} GB free for {len(plan.todo):,} files, "
            f"got {free / 1e9:,.1f} GB. Choose fewer with --patients, --volumes or --limit.",
        )
    return free


def is_safe(path: str) -> bool:
    """Tell whether a path of the hub leads to a place inside of a download that is not the download's own.

    Example:
        >>> is_safe("dataset/metadata/train_metadata.csv"), is_safe("../.bashrc")
        (True, False)
    """
    parts = path.split("/")
    is_plain = all(part not in ("", ".", "..") for part in parts) and path.isprintable()
    return is_plain and not set(path) & set("\\:") and parts[0] not in (STATE, FAILED)


def download(
    api: "HfApi",
    repo_id: str,
    commit: str,
    files: Sequence[RemoteFile],
    out: Path,
    jobs: int,
    progress: ShowDownload,
) -> list[FailedFile]:
    """Fetch files into the places they have in the repository.

    A file takes its name when its size and digest are right, and is listed as verified then. A killed
    download leaves whole files only; those it was fetching start anew, for huggingface_hub keeps no parts.

    Args:
        api: see ``hub_access.open_repository``.
        repo_id: owner and name of the dataset.
        commit: of the repository.
        files: of safe paths, see ``plan_download``.
        out: folder of the download.
        jobs: files at a time.
        progress: called as bytes arrive, from several threads.

    Returns:
        The files that failed, for reasons of their own.

    Raises:
        OSError: if nothing more can be downloaded, see ``hub_access.explained``, or ``out`` is in use.
    """
    from huggingface_hub.errors import HTTPError

    failed: list[FailedFile] = []
    with _state(out) as (staging, verified):
        counter = _Counter(progress)
        with _pool(jobs, counter.stop) as pool:
            futures: dict[Future[None], RemoteFile] = {
                pool.submit(_fetch, api, repo_id, commit, file, out, staging, counter): file for file in files
            }
            for future in as_completed(futures):
                file = futures[future]
                try:
                    future.result()
                except (OSError, ValueError, RuntimeError, HTTPError) as error:
                    fatal = explained(error, repo_id, api.endpoint)
                    if fatal is not None:
                        raise fatal from error
                    failed.append(FailedFile(file.path, one_line(error)))
                else:
                    csv.writer(verified, lineterminator="\n").writerow((file.path, file.digest, commit))
                    verified.flush()
                counter.finish_file()
    return failed


def write_failed(out: Path, failed: Sequence[FailedFile]) -> None:
    """Write the files that failed as ``failed.csv``; without any, there is no such file.

    Args:
        out: folder of the download.
        failed: the files.
    """
    if not failed:
        (out / FAILED).unlink(missing_ok=True)
        return
    write_table(out / FAILED, FailedFile._fields, failed)


class _Counter:
    """Adds up what the threads of a download have done, and tells them to stop."""

    def __init__(self, progress: ShowDownload) -> None:
        self.stop = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()
        self._num_files = self._num_bytes = 0

    def finish_file(self) -> None:
        with self._lock:
            self._num_files += 1
            self._progress(self._num_files, self._num_bytes)

    def add_bytes(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
            self._progress(self._num_files, self._num_bytes)


def _bar_class(add_bytes: Callable[[int], None], stop: threading.Event) -> type:
    """Return what huggingface_hub takes for the class of its progress bars: it shows nothing and counts."""

    class Bar:
        def __init__(self, **_: object) -> None: ...

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, num_bytes: float | None = 0) -> None:
            if stop.is_set():
                raise StoppedError
            add_bytes(int(num_bytes or 0))

        def ignore(self, *_: object, **__: object) -> None:
            """Take what bars of huggingface_hub are told besides: of bytes still packed, of their looks."""

        close = update_transfer = set_postfix_str = set_transfer_postfix_str = ignore

    return Bar


def _fetch(
    api: "HfApi", repo_id: str, commit: str, file: RemoteFile, out: Path, staging: Path, counter: _Counter
) -> None:
    """Fetch one file, verify it and give it its name."""
    final = out / file.path
    counted = 0

    def count(num_bytes: int) -> None:
        nonlocal counted
        counted += num_bytes
        counter.add_bytes(num_bytes)

    try:
        if not is_whole(final, file):
            name = api.hf_hub_download(
                repo_id,
                file.path,
                repo_type="dataset",
                revision=commit,
                local_dir=staging,
                tqdm_class=_bar_class(count, counter.stop),
            )
            if not is_whole(Path(name), file):
                Path(name).unlink()
                raise OSError(f"file must have {file.num_bytes} bytes of digest {file.digest}, got others")
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(name, final)
            count(file.num_bytes - counted)
    except BaseException:
        count(-counted)
        raise


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Tell whether a file on the disk is that of the hub, byte by byte, and wait until it is on the disk.

    Args:
        path: on the disk.
        file: of the hub.
    """
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    is_sha256 = len(file.digest) == hashlib.sha256().digest_size * 2
    # Git hashes a header before the bytes; see https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(f"blob {file.num_bytes}\0".encode())
    with path.open("rb") as content:
        while block := content.read(READ_BYTES):
            digest.update(block)
        os.fsync(content.fileno())
    return digest.hexdigest() == file.digest


@contextmanager
def _pool(jobs: int, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Start threads; when the work is left early, tell them to stop in place of finishing what they fetch."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _state(out: Path) -> Iterator[tuple[Path, TextIO]]:
    """Lock a download; yields an empty folder for files under way and the open list of verified files."""
    folder = out / STATE
    staging = folder / "partial"
    with claimed(folder):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            with (folder / "verified.csv").open("a+", newline="", encoding="utf-8") as verified:
                verified.write("\n")  # ends a line that a killed process left unfinished
                yield staging, verified
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _read_verified(out: Path) -> dict[str, str]:
    """Read the digests of verified files; a line that a killed process left unfinished counts as none."""
    path = out / STATE / "verified.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) == 3}
