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
from data_prep.cluster import ShowProgress
from data_prep.shards.parts import PartReport, clean_parts, finished, output_errors
from data_prep.shards.plan import PlannedShard, plan_shards
from data_prep.shards.tables import write_manifest, write_rejected
from data_prep.shards.tasks import ShardTasks
from data_prep.sources.source_volume import SourceVolume

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)


TOTALS = ("num_volumes", "num_slices", "num_ts", "num_rex", "num_doubtful", "num_bytes")
"""What a summary adds up over shards."""


class Summary(NamedTuple):
    """The outcome for a cohort.

    Args:
        num_volumes: volumes in shards.
        num_slices: slices in shards.
        num_ts: volumes with a TotalSegmentator label map.
        num_rex: volumes annotated by ReXGroundingCT.
        num_doubtful: volumes that look unlike a chest CT.
        num_shards: shards of the split.
        num_bytes: size of the shards.
        num_resumed: volumes that an earlier run had finished, including those it left out.
        num_done: volumes that this run finished, including those it left out.
        num_resumed_shards: shards that an earlier run had finished.
        rejected: volumes left out, and why.
        num_workers: processes that did the work of this run.
        peak_worker_bytes: most memory that one of them has held.
        seconds: duration of the run.
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
    *,
    slices_per_shard: int = 5000,
    progress: ShowProgress = lambda stage, done, total: None,
) -> Summary:
    """Write all volumes of a split into shards, with a manifest and a list of what was left out.

    The plan follows from headers alone, so the same sources always give the same shards, byte for byte. A
    volume is done when its part exists, a shard when its index exists with the fingerprint of its plan; a run
    after a stop, however abrupt, does only the rest.

    Args:
        sources: volumes to write.
        rejected: volumes that were left out before.
        out: folder of the shards, shared by all workers; it may hold other splits already.
        split: split of all volumes.
        client: Dask cluster that does the work.
        slices_per_shard: a shard takes volumes until the next would exceed it. Paper's released code: 5,000.
        progress: called after every volume.

    Raises:
        ValueError: if ``slices_per_shard`` is not positive, ``split`` cannot name a shard, ``out`` holds
            shards of the split that this plan has no place for or that hold none of the sources, or two
            volumes have the same name.
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
        shards, unplanned = plan_shards(
            sources, out, split, client, slices_per_shard=slices_per_shard, progress=progress
        )
        _refuse_strangers(out, split, shards, {source.volume for source in sources})
        missing = [shard for shard in shards if not _is_finished(shard)]
        num_before = _num_volumes(shards) - _num_volumes(missing)
        clean_parts(out, split, missing)
        reports = _write_missing(missing, num_before, client, progress)
        clean_parts(out, split, [])
        totals: Counter[str] = Counter()
        left_out = [*rejected, *unplanned]
        for shard in shards:
            left_out += _count(load_index(shard.path), totals)
        with output_errors(out):
            write_manifest(out, split, left_out, {item.volume: item.source for item in sources})
            write_rejected(out, split, left_out)
    return Summary(
        **{name: totals[name] for name in TOTALS},
        num_shards=len(shards),
        num_resumed=num_before + sum(report.was_there for report in reports),
        num_done=sum(not report.was_there for report in reports),
        num_resumed_shards=len(shards) - len(missing),
        rejected=tuple(left_out),
        num_workers=len({report.worker for report in reports if report.worker and not report.was_there}),
        peak_worker_bytes=max((report.peak_bytes for report in reports), default=0),
        seconds=time.monotonic() - start,
    )


def _count(index: ShardIndex, totals: Counter[str]) -> list[RejectedVolume]:
    """Add a shard to a summary's totals; indices of a whole cohort would not fit into memory."""
    totals.update(
        num_volumes=len(index.volume),
        num_slices=int(index.num_slices.sum()),
        num_ts=int(index.has_ts.sum()),
        num_rex=int(index.has_rex.sum()),
        num_doubtful=int((index.doubts != "").sum()),
        num_bytes=int(index.tar_bytes),
    )
    return index.rejections


def _write_missing(
    shards: Sequence[PlannedShard], num_before: int, client: Client, progress: ShowProgress
) -> list[PartReport]:
    """Write shards, showing the progress of the whole split; return the reports of their volumes."""
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
            "'%s' is written again: it is incomplete, or its sources or the settings have changed.",
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
            f"'{out}' holds shards of another run: {strangers}. Delete them, or choose another --out."
        )


def _holds_others(shard: Path, volumes: set[str]) -> bool:
    """Tell whether a complete shard holds volumes, but none of a cohort."""
    try:
        found = set(load_index(shard).volume.tolist())
    except (FileNotFoundError, ValueError):  # incomplete: it is written again
        return False
    return bool(found) and not found & volumes
