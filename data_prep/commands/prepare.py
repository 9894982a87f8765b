"""What the commands that write shards share: workers, progress bars, the summary, the exit status."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.ct.rejection import RejectedVolume, is_failure
from data_prep.cluster import dask_client
from data_prep.cohort_tables import MANIFEST, REJECTED
from data_prep.commands.console import console, progress_bars
from data_prep.source_volume import SourceVolume
from data_prep.write_shards import Summary, write_shards


def prepare(
    sources: Sequence[SourceVolume],
    rejected: Sequence[RejectedVolume],
    out: Path,
    split: str,
    slices_per_shard: int,
    max_rejected: float,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Write a cohort into shards on a Dask cluster and say what came of it.

    Args:
        sources: volumes to write.
        rejected: volumes that were left out before.
        out: folder of the shards.
        split: of all volumes.
        slices_per_shard: see ``write_shards``.
        max_rejected: share of rejected volumes past which the exit status is 1.
        workers: see ``dask_client``.
        scheduler: see ``dask_client``.

    Raises:
        typer.Exit: with status 1 if too many volumes were rejected.
    """
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        here = [source.absolute() for source in sources]  # workers may stand in another folder
        summary = write_shards(here, rejected, out.absolute(), split, client, slices_per_shard, progress)
    _finish(summary, out, max_rejected)


def _finish(summary: Summary, out: Path, max_rejected: float) -> None:
    """Print what came of the cohort; leave with status 1 where too much of it was rejected."""
    table = Table(title=f"Shards in {escape(str(out))}", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in _rows(summary):
        table.add_row(name, value)
    Console().print(table)
    if summary.num_doubtful:
        console.print(
            f"{summary.num_doubtful} of {summary.num_volumes} volumes are doubtful: see column 'doubts' of "
            f"{escape(str(out / MANIFEST))}.",
            soft_wrap=True,
        )
    left_out = f"; {len(summary.rejected):,} left out, listed in {REJECTED}" if summary.rejected else ""
    what = f"{summary.num_volumes:,} volumes in {summary.num_shards:,} shards"
    console.print(f"Done: {what} in {escape(str(out))}{left_out}.", soft_wrap=True)
    if summary.rejected_share > max_rejected:
        console.print(
            f"rejected volumes must be at most {max_rejected:.2%}, got {summary.rejected_share:.2%} "
            f"({sum(map(is_failure, summary.rejected))} volumes). Mend them, or raise --max-rejected.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "volumes", f"{summary.num_volumes:,}"
    yield "with TotalSegmentator ids", f"{summary.num_ts:,}"
    yield "annotated by ReXGroundingCT", f"{summary.num_rex:,}"
    yield "slices", f"{summary.num_slices:,}"
    yield "shards", f"{summary.num_shards:,}"
    yield "MB", f"{summary.num_bytes / 1e6:,.1f}"
    if summary.num_volumes:
        yield "MB a volume", f"{summary.num_bytes / 1e6 / summary.num_volumes:,.1f}"
    if summary.num_resumed:
        yield "done before: volumes", f"{summary.num_resumed:,}"
        yield "done before: shards", f"{summary.num_resumed_shards:,}"
    if summary.num_workers:
        yield "volumes a minute", f"{summary.num_done / summary.seconds * 60:,.1f}"
        yield "workers", f"{summary.num_workers:,}"
        yield "peak memory of a worker, MB", f"{summary.peak_worker_bytes / 1e6:,.0f}"
    for reason, count in sorted(summary.reasons.items()):
        yield f"left out: {reason}", f"{count:,}"
