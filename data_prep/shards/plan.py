"""Decides from headers alone which volumes go into which shard, so a run after a stop decides the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.ct.rejection import RejectedError, RejectedVolume
from common.shards.index import SCHEMA_VERSION
from common.shards.shards import PARTS
from data_prep.cluster import ShowProgress, run_tasks
from data_prep.sources.source_volume import SourceVolume, planned_slices

if TYPE_CHECKING:
    from distributed import Client

HEADERS_PER_TASK = 64
"""Headers per task: a task costs five milliseconds, a header on a network disk more."""

UNEXPECTED = "unexpected error"
WORKER_DIED = "worker died"


class PlannedVolume(NamedTuple):
    """A volume to be written, one task.

    Args:
        source: its files.
        plan: fingerprint of everything that its bytes in a shard depend on.
        shard: path of the shard's tar.
    """

    source: SourceVolume
    plan: str
    shard: Path

    @property
    def part(self) -> Path:
        """Tar of this volume alone, until its shard is put together."""
        return parts_folder(self.shard) / f"{self.source.volume}.tar"


class PlannedShard(NamedTuple):
    """A shard to be written.

    Args:
        path: path of the tar.
        volumes: volumes in order.
        plan: fingerprint of all volumes.
    """

    path: Path
    volumes: tuple[PlannedVolume, ...]
    plan: str


class Header(NamedTuple):
    """What is known about a volume before it is read: slices it promises, and the fingerprint of its plan."""

    num_slices: int
    plan: str


def parts_folder(shard: Path) -> Path:
    """Return where the parts of a shard lie until it is put together.

    Example:
        >>> parts_folder(Path("shards/train-000000.tar")).as_posix()
        'shards/.parts/train-000000'
    """
    return shard.parent / PARTS / shard.stem


def plan_shards(
    sources: Sequence[SourceVolume],
    out: Path,
    split: str,
    client: Client,
    *,
    slices_per_shard: int,
    progress: ShowProgress,
) -> tuple[list[PlannedShard], list[RejectedVolume]]:
    """Decide from headers which volumes go into which shard.

    Args:
        sources: volumes to write, in any order.
        out: folder of the shards.
        split: split of all volumes.
        client: Dask cluster that reads the headers.
        slices_per_shard: a shard takes volumes until the next would exceed it.
        progress: called after every batch of headers.

    Returns:
        The shards, with annotated scans in shards of their own, and the volumes rejected by their headers.

    Raises:
        ValueError: if two volumes have the same name.
    """
    names = Counter(source.volume for source in sources)
    if len(names) < len(sources):
        raise ValueError(f"Volume '{names.most_common(1)[0][0]}' is there twice.")
    headers = _read_all_headers(sources, client, progress)
    groups: dict[bool, list[list[SourceVolume]]] = {False: [], True: []}
    sizes = {False: 0, True: 0}
    rejected = []
    for source in sorted(sources, key=lambda source: source.volume):
        header = headers[source.volume]
        if isinstance(header, RejectedVolume):
            rejected.append(header)
            continue
        annotated = source.rex is not None
        if not groups[annotated] or sizes[annotated] + header.num_slices > slices_per_shard:
            groups[annotated].append([])
            sizes[annotated] = 0
        groups[annotated][-1].append(source)
        sizes[annotated] += header.num_slices
    plans = {volume: header.plan for volume, header in headers.items() if isinstance(header, Header)}
    shards = [
        _planned_shard(out / f"{split}-{'rex-' if annotated else ''}{number:06d}.tar", group, plans)
        for annotated in (False, True)
        for number, group in enumerate(groups[annotated])
    ]
    return shards, rejected


def fingerprint(source: SourceVolume) -> str:
    """Return a digest of everything that a volume's bytes in a shard depend on, without reading voxels.

    A file counts by name, size and time of change.

    Raises:
        OSError: if one of its files is missing.
    """
    described = {
        "schema_version": SCHEMA_VERSION,
        "volume": source.volume,
        "split": source.split,
        "source": source.source,
        "ct": [_file_state(path) for path in source.ct.on_disk],
        "form": source.form,
        "rescale": source.rescale,
        "ts": source.ts and _file_state(source.ts),
        "rex": source.rex and (_file_state(source.rex.path), source.rex.codes),
        "labels": source.labels,
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def unexpected_error(volume: str, error: BaseException) -> RejectedVolume:
    """Record a volume that failed in an unforeseen way."""
    return RejectedError(UNEXPECTED, f"{type(error).__name__}: {error}").of(volume)


def worker_died(volume: str) -> RejectedVolume:
    """Record a volume that killed the workers that read it."""
    detail = "workers died each time they read it: too large for their memory, or a library crashed"
    return RejectedVolume(volume, WORKER_DIED, detail)


def _planned_shard(path: Path, sources: Sequence[SourceVolume], plans: dict[str, str]) -> PlannedShard:
    volumes = tuple(PlannedVolume(source, plans[source.volume], path) for source in sources)
    plan = hashlib.sha256(json.dumps([volume.plan for volume in volumes]).encode()).hexdigest()
    return PlannedShard(path, volumes, plan)


def _read_all_headers(
    sources: Sequence[SourceVolume], client: Client, progress: ShowProgress
) -> dict[str, Header | RejectedVolume]:
    """Read headers in batches; if a batch kills workers, read its headers one by one."""
    from distributed import KilledWorker

    headers: dict[str, Header | RejectedVolume] = {}
    progress("Reading headers", 0, len(sources))
    batches = [
        tuple(sources[first : first + HEADERS_PER_TASK]) for first in range(0, len(sources), HEADERS_PER_TASK)
    ]
    while batches:
        smaller: list[tuple[SourceVolume, ...]] = []
        for batch, result in run_tasks(client, _read_headers, batches):
            if not isinstance(result, BaseException):
                headers.update(zip((source.volume for source in batch), result, strict=True))
            elif not isinstance(result, KilledWorker):
                raise result
            elif len(batch) > 1:
                smaller += [(source,) for source in batch]
            else:
                headers[batch[0].volume] = worker_died(batch[0].volume)
            progress("Reading headers", len(headers), len(sources))
        batches = smaller
    return headers


def _read_headers(sources: Sequence[SourceVolume]) -> list[Header | RejectedVolume]:
    return [_read_header(source) for source in sources]


def _read_header(source: SourceVolume) -> Header | RejectedVolume:
    try:
        return Header(planned_slices(source), fingerprint(source))
    except RejectedError as error:
        return error.of(source.volume)
    except OSError as error:
        return RejectedError("unreadable", str(error)).of(source.volume)
    except Exception as error:  # noqa: BLE001 (one volume never stops the run)
        return unexpected_error(source.volume, error)


def _file_state(path: Path) -> tuple[str, int, int]:
    state = path.stat()
    return path.name, state.st_size, state.st_mtime_ns
