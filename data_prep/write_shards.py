"""Writes a cohort into shards: planned from headers, resumed after a stop, every volume accounted for."""

import fcntl
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.data.shard_index import SCHEMA_VERSION, RejectedVolume, ShardIndex, load_index
from common.data.shard_volume import VolumeSlices
from common.data.shards import SHARD_NAME, write_shard
from data_prep.cohort_tables import write_manifest, write_rejected
from data_prep.rejection import RejectedError, is_failure
from data_prep.source_volume import SourceVolume, planned_slices, read_volume

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class PlannedShard(NamedTuple):
    """A shard to be written.

    Args:
        path: of the tar.
        sources: its volumes, in order.
        num_slices: that headers promise, by volume.
        plan: fingerprint of the sources.
    """

    path: Path
    sources: tuple[SourceVolume, ...]
    num_slices: tuple[int, ...]
    plan: str


class Summary(NamedTuple):
    """What came of a cohort.

    Args:
        num_volumes: in shards.
        num_slices: in shards.
        num_ts: volumes with a TotalSegmentator label map.
        num_rex: volumes annotated by ReXGroundingCT.
        num_shards: of the split.
        num_bytes: of its shards.
        num_resumed: shards that an earlier run had finished.
        rejected: volumes left out, and why.
    """

    num_volumes: int
    num_slices: int
    num_ts: int
    num_rex: int
    num_shards: int
    num_bytes: int
    num_resumed: int
    rejected: tuple[RejectedVolume, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """Volumes left out, by reason."""
        return dict(Counter(item.reason for item in self.rejected))

    @property
    def rejected_share(self) -> float:
        """Share of the volumes meant to be used that were rejected; 1 if there were none at all."""
        failures = sum(map(is_failure, self.rejected))
        meant = self.num_volumes + failures
        return failures / meant if meant else 1.0


def write_shards(
    sources: Sequence[SourceVolume],
    rejected: Sequence[RejectedVolume],
    out: Path,
    split: str,
    slices_per_shard: int = 5000,
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Write all volumes of a split into shards, with a manifest and a list of what was left out.

    The plan follows from headers alone, so the same sources always give the same shards, byte for byte. A
    shard is finished when its index is there and carries the fingerprint of its plan; a run after a stop,
    however hard, writes only the others.

    Args:
        sources: volumes to write.
        rejected: volumes that were left out before.
        out: folder of the shards; other splits may be in it already.
        split: of all volumes.
        slices_per_shard: a shard takes volumes until the next would exceed it. Paper's released code: 5,000.
        progress: told of every volume.

    Returns:
        What came of the cohort.

    Raises:
        ValueError: if ``slices_per_shard`` is not positive, or ``out`` holds shards of the split that this
            plan has no place for.
        BlockingIOError: if another run writes into ``out``.
    """
    if slices_per_shard < 1:
        raise ValueError(f"slices_per_shard must be positive, got {slices_per_shard}.")
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out):
        shards, unplanned = plan_shards(sources, out, split, slices_per_shard, progress)
        _refuse_strangers(out, split, shards)
        indices, num_resumed = _write_planned(shards, progress)
        left_out = [*rejected, *unplanned, *(item for index in indices for item in _rejections(index))]
        write_manifest(out)
        write_rejected(out, split, left_out)
    return Summary(
        num_volumes=sum(len(index.volume) for index in indices),
        num_slices=sum(int(index.num_slices.sum()) for index in indices),
        num_ts=sum(int(index.has_ts.sum()) for index in indices),
        num_rex=sum(int(index.has_rex.sum()) for index in indices),
        num_shards=len(indices),
        num_bytes=sum(int(index.tar_bytes) for index in indices),
        num_resumed=num_resumed,
        rejected=tuple(left_out),
    )


def plan_shards(
    sources: Sequence[SourceVolume], out: Path, split: str, slices_per_shard: int, progress: Progress
) -> tuple[list[PlannedShard], list[RejectedVolume]]:
    """Decide from headers which volumes go into which shard.

    Args:
        sources: volumes to write, in any order.
        out: folder of the shards.
        split: of all volumes.
        slices_per_shard: a shard takes volumes until the next would exceed it.
        progress: told of every header.

    Returns:
        The shards, annotated scans in shards of their own, and the volumes whose header is reason enough to
        leave them out.
    """
    planned: dict[bool, list[list[tuple[SourceVolume, int]]]] = {False: [], True: []}
    rejected = []
    for done, source in enumerate(sorted(sources, key=lambda source: source.volume), start=1):
        try:
            num_slices = planned_slices(source)
        except RejectedError as error:
            rejected.append(error.of(source.volume))
        else:
            groups = planned[source.rex is not None]
            if not groups or sum(n for _, n in groups[-1]) + num_slices > slices_per_shard:
                groups.append([])
            groups[-1].append((source, num_slices))
        progress("Reading headers", done, len(sources))
    shards = [
        PlannedShard(
            path=out / f"{split}-{'rex-' if annotated else ''}{number:06d}.tar",
            sources=tuple(source for source, _ in group),
            num_slices=tuple(n for _, n in group),
            plan=_fingerprint([source for source, _ in group]),
        )
        for annotated, groups in planned.items()
        for number, group in enumerate(groups)
    ]
    return shards, rejected


def _fingerprint(sources: Sequence[SourceVolume]) -> str:
    """Everything a shard's bytes depend on, short of reading the voxels: a file counts by its size."""
    described = [
        {
            "volume": source.volume,
            "split": source.split,
            "ct": source.ct.stat().st_size,
            "form": source.form,
            "rescale": source.rescale,
            "ts": source.ts and source.ts.stat().st_size,
            "rex": source.rex and (source.rex.path.stat().st_size, source.rex.codes),
            "labels": source.labels,
        }
        for source in sources
    ]
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, described]).encode()).hexdigest()


def _write_planned(shards: Sequence[PlannedShard], progress: Progress) -> tuple[list[ShardIndex], int]:
    indices, num_resumed, done = [], 0, 0
    total = sum(sum(shard.num_slices) for shard in shards)
    progress("Writing slices", 0, total)
    for shard in shards:
        index = _finished(shard)
        if index is None:
            index = write_shard(shard.path, _read(shard, done, total, progress), shard.plan)
        else:
            num_resumed += 1
        done += sum(shard.num_slices)
        progress("Writing slices", done, total)
        indices.append(index)
    return indices, num_resumed


def _read(
    shard: PlannedShard, done: int, total: int, progress: Progress
) -> Iterator[VolumeSlices | RejectedVolume]:
    """Read volumes one by one; the only place where one may fail without ending the run."""
    for source, num_slices in zip(shard.sources, shard.num_slices, strict=True):
        try:
            yield read_volume(source)
        except RejectedError as error:
            logger.warning("'%s' is left out: %s", source.volume, error)
            yield error.of(source.volume)
        done += num_slices
        progress("Writing slices", done, total)


def _finished(shard: PlannedShard) -> ShardIndex | None:
    """Return the index of a shard that an earlier run wrote by the same plan."""
    try:
        index = load_index(shard.path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("'%s' is written again: %s", shard.path.name, error)
        return None
    if str(index.plan) != shard.plan:
        logger.warning("'%s' is written again: its sources or the settings are others now.", shard.path.name)
        return None
    return index


def _refuse_strangers(out: Path, split: str, shards: Sequence[PlannedShard]) -> None:
    planned = {shard.path.name for shard in shards}
    named = {path.name: SHARD_NAME.fullmatch(path.name) for path in out.iterdir()}
    of_split = {name for name, match in named.items() if match and match["split"] == split}
    strangers = sorted(of_split - planned)
    if strangers:
        raise ValueError(
            f"out must hold only shards of this plan, got {strangers} of another run in '{out}'. "
            "Delete them, or choose another --out."
        )


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"out must be written by one run at a time, got another in '{out}'."
            ) from error
        yield


def _rejections(index: ShardIndex) -> list[RejectedVolume]:
    rows = zip(index.rejected_volume, index.rejected_reason, index.rejected_detail, strict=True)
    return [RejectedVolume(str(volume), str(reason), str(detail)) for volume, reason, detail in rows]
