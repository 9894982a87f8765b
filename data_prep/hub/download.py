"""Downloads files of a dataset on the hub: several at a time, verified, and resumed by a rerun."""

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
"""Folder inside the download: partial files, and the list of verified ones."""

FAILED = "failed.csv"
READ_BYTES = 1 << 20

ShowDownload = Callable[[int, int], None]
"""Called with the files and the bytes that are done."""


class FailedFile(NamedTuple):
    """A file that was not downloaded: its path in the repository, and the reason in one line."""

    path: str
    reason: str


class Plan(NamedTuple):
    """What a download has to do.

    Args:
        todo: files to fetch.
        num_kept: files that are there already, verified.
        num_bytes: size of the files to fetch.
        unsafe: files whose path would lie outside the download or on its own files.
    """

    todo: list[RemoteFile]
    num_kept: int
    num_bytes: int
    unsafe: list[FailedFile]


class StoppedError(Exception):
    """Stops fetching a file after the whole download has failed."""


def plan_download(files: Sequence[RemoteFile], out: Path) -> Plan:
    """Compare the wanted files with those in the folder of a download."""
    verified = _read_verified(out)
    todo, unsafe = [], []
    num_kept = num_bytes = 0
    for file in files:
        if not is_safe(file.path):
            unsafe.append(FailedFile(file.path, "its path leads outside the download"))
            continue
        size = (out / file.path).stat().st_size if (out / file.path).is_file() else None
        if size == file.num_bytes and verified.get(file.path) == file.digest:
            num_kept += 1
            continue
        todo.append(file)
        num_bytes += file.num_bytes if size != file.num_bytes else 0
    return Plan(todo, num_kept, num_bytes, unsafe)


def check_room(plan: Plan, out: Path) -> int:
    """Return the free bytes for a download.

    Raises:
        OSError: if they are too few.
    """
    free = shutil.disk_usage(out).free
    if plan.num_bytes > free:
        raise OSError(
            f"{len(plan.todo):,} files need {plan.num_bytes / 1e9:,.1f} GB, but only {free / 1e9:,.1f} GB "
            "are free. Choose fewer with --patients, --volumes or --limit.",
        )
    return free


def is_safe(path: str) -> bool:
    """Tell whether a path of the hub leads to a place inside a download that is not the download's own.

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
    *,
    jobs: int,
    progress: ShowDownload,
) -> list[FailedFile]:
    """Fetch files into the places they have in the repository.

    A file gets its name once its size and digest are right, and is then listed as verified. A killed download
    leaves only complete files; those it was fetching start anew, because huggingface_hub keeps no parts.

    Args:
        api: hub, see ``hub.access.open_repository``.
        repo_id: owner and name of the dataset.
        commit: commit of the repository.
        files: files with safe paths, see ``plan_download``.
        out: folder of the download.
        jobs: files at a time.
        progress: called as bytes arrive, from several threads.

    Returns:
        The files that failed, for reasons of their own.

    Raises:
        OSError: if nothing more can be downloaded, see ``hub.access.explained``, or ``out`` is in use.
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
    """Write the files that failed as ``failed.csv``; without any, there is no such file."""
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
    """Return a stand-in for huggingface_hub's progress bar class: it shows nothing and counts."""

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
            """Accept the other calls that a bar of huggingface_hub gets."""

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
                raise OSError(f"it does not have the {file.num_bytes} bytes of digest {file.digest}")
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(name, final)
            count(file.num_bytes - counted)
    except BaseException:
        count(-counted)
        raise


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Tell whether a file on disk is that of the hub, byte for byte, and flush it to the disk."""
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
    """Start threads; when the block is left early, tell them to stop instead of finishing their files."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _state(out: Path) -> Iterator[tuple[Path, TextIO]]:
    """Lock a download; yields an empty folder for partial files and the open list of verified files."""
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
    """Read the digests of verified files, skipping a line that a killed process left unfinished."""
    path = out / STATE / "verified.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) == 3}
