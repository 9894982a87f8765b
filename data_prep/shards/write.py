"""Writes a cohort into shards: planned from headers, resumed after a stop, every volume accounted for."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.ct.rejection import RejectedVolume, is_failure
from common.run.process import claimed
from common.shards.index import ShardIndex, load_index
from common.shards.shards import SHARD_NAME, parse_shard_name
from data_prep.shards.parts import PartReport, clean_parts, finished, output_errors
from data_prep.shards.plan import PlannedShard, Progress, plan_shards
from data_prep.shards.tables import write_manifest, write_rejected
from data_prep.shards.tasks import ShardTasks
from data_prep.sources.source_volume import SourceVolume

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)


class Summary(NamedTuple):
    """What came of a cohort.

    Args:
        num_volumes: in shards.
        num_slices: in shards.
        num_ts: volumes with a TotalSegmentator label map.
        num_rex: volumes annotated by ReXGroundingCT.
        num_doubtful: volumes that look unlike a chest CT.
        num_shards: of the split.
        num_bytes: of its shards.
        num_resumed: volumes that an earlier run had done, also those that it left out.
        num_done: volumes that this run did, also those that it left out.
        num_resumed_shards: shards that an earlier run had finished.
        rejected: volumes left out, and why.
        num_workers: processes that did the others.
        peak_worker_bytes: most memory that one of them has held.
        seconds: that the run took.
    """

    num_volumes: int
    num_slices: int
    num_ts: int
    num_rex: int
    num_doubtful: int
    num_shards: int
    num_bytes: int
    num_resumed: int
    num_done: int
    num_resumed_shards: int
    rejected: tuple[RejectedVolume, ...]
    num_workers: int
    peak_worker_bytes: int
    seconds: float

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
    client: Client,
    slices_per_shard: int = 5000,
    progress: Progress = lambda stage, done, total: None,
) -> Summary:
    """Write all volumes of a split into shards, with a manifest and a list of what was left out.

    The plan follows from headers alone, so the same sources always give the same shards, byte for byte. A
    volume is done when its part is there, a shard when its index is, with the fingerprint of its plan; a run
    after a stop, however hard, does only the others.

    Args:
        sources: volumes to write.
        rejected: volumes that were left out before.
        out: folder of the shards, which all workers share; other splits may be in it already.
        split: of all volumes.
        client: of the cluster that does the work.
        slices_per_shard: a shard takes volumes until the next would exceed it. Paper's released code: 5,000.
        progress: told of every volume.

    Returns:
        What came of the cohort.

    Raises:
        ValueError: if ``slices_per_shard`` is not positive, ``split`` cannot name a shard, or ``out`` holds
            shards of the split that this plan has no place for, or of none of the sources, or two volumes
            have one name.
        BlockingIOError: if another run writes into ``out``.
        OutputError: if ``out`` cannot be written to, such as on a full disk.
        ConnectionError: if the cluster is lost.
    """
    start = time.monotonic()
    if slices_per_shard < 1:
        raise ValueError(f"slices_per_shard must be positive, got {slices_per_shard}.")
    parse_shard_name(f"{split}-000000.tar")
    with ExitStack() as until_done:
        with output_errors(out):
            until_done.enter_context(claimed(out))
        shards, unplanned = plan_shards(sources, out, split, client, slices_per_shard, progress)
        _refuse_strangers(out, split, shards, {source.volume for source in sources})
        missing = [shard for shard in shards if not _is_finished(shard)]
        num_before = _num_volumes(shards) - _num_volumes(missing)
        clean_parts(out, split, missing)
        reports = _write_missing(missing, num_before, client, progress)
        clean_parts(out, split, [])
        tallies = [_tally(load_index(shard.path)) for shard in shards]
        left_out = [*rejected, *unplanned, *(item for tally in tallies for item in tally.rejected)]
        with output_errors(out):
            write_manifest(out, split, left_out, {item.volume: item.source for item in sources})
            write_rejected(out, split, left_out)
    return Summary(
        num_volumes=sum(tally.num_volumes for tally in tallies),
        num_slices=sum(tally.num_slices for tally in tallies),
        num_ts=sum(tally.num_ts for tally in tallies),
        num_rex=sum(tally.num_rex for tally in tallies),
        num_doubtful=sum(tally.num_doubtful for tally in tallies),
        num_shards=len(shards),
        num_bytes=sum(tally.num_bytes for tally in tallies),
        num_resumed=num_before + sum(report.was_there for report in reports),
        num_done=sum(not report.was_there for report in reports),
        num_resumed_shards=len(shards) - len(missing),
        rejected=tuple(left_out),
        num_workers=len({report.worker for report in reports if report.worker and not report.was_there}),
        peak_worker_bytes=max((report.peak_bytes for report in reports), default=0),
        seconds=time.monotonic() - start,
    )


class _Tally(NamedTuple):
    """What a summary needs of a shard: indices of a whole cohort would not fit into memory."""

    num_volumes: int
    num_slices: int
    num_ts: int
    num_rex: int
    num_doubtful: int
    num_bytes: int
    rejected: list[RejectedVolume]


def _tally(index: ShardIndex) -> _Tally:
    return _Tally(
        num_volumes=len(index.volume),
        num_slices=int(index.num_slices.sum()),
        num_ts=int(index.has_ts.sum()),
        num_rex=int(index.has_rex.sum()),
        num_doubtful=int((index.doubts != "").sum()),
        num_bytes=int(index.tar_bytes),
        rejected=index.rejections,
    )


def _write_missing(
    shards: Sequence[PlannedShard], num_before: int, client: Client, progress: Progress
) -> list[PartReport]:
    """Write shards while showing the progress of the whole split; return what came of their volumes."""
    total = num_before + _num_volumes(shards)
    progress("Writing volumes", num_before, total)
    reports: dict[str, PartReport] = {}
    for report in ShardTasks(shards, client).run():
        if report.rejected is not None and not report.was_there:
            logger.warning("'%s' is left out: %s: %s", *report.rejected)
        reports[report.volume] = report
        progress("Writing volumes", num_before + len(reports), total)
    return list(reports.values())


def _is_finished(shard: PlannedShard) -> bool:
    """Tell whether an earlier run wrote a shard by the same plan."""
    if finished(shard.path, shard.plan) is not None:
        return True
    if shard.path.exists():
        logger.warning(
            "'%s' is written again: it is not whole, or its sources or the settings are others now.",
            shard.path.name,
        )
    return False


def _num_volumes(shards: Sequence[PlannedShard]) -> int:
    return sum(len(shard.volumes) for shard in shards)


def _refuse_strangers(out: Path, split: str, shards: Sequence[PlannedShard], volumes: set[str]) -> None:
    planned = {shard.path.name for shard in shards}
    named = {path.name: SHARD_NAME.fullmatch(path.name) for path in out.iterdir()}
    of_split = {name for name, match in named.items() if match and match["split"] == split}
    strangers = sorted(of_split - planned | {s.path.name for s in shards if _holds_others(s.path, volumes)})
    if strangers:
        raise ValueError(
            f"out must hold only shards of this plan, got {strangers} of another run in '{out}'. "
            "Delete them, or choose another --out."
        )


def _holds_others(shard: Path, volumes: set[str]) -> bool:
    """Tell whether a whole shard holds volumes, but none of a cohort."""
    try:
        found = set(load_index(shard).volume.tolist())
    except (FileNotFoundError, ValueError):  # not whole: it is written again
        return False
    return bool(found) and not found & volumes
