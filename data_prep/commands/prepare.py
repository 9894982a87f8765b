"""``ct-rate``, ``rad-chestct``, ``nifti`` and ``dicom``: a dataset into shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from common.ct.rejection import RejectedVolume, is_failure
from data_prep.cluster import dask_client
from data_prep.commands.console import check_rejected, console, progress_bars, show_rows
from data_prep.commands.options import (
    CTRateMaps,
    CTRateRoot,
    FirstVolumes,
    LabelMaps,
    MaxRejected,
    Out,
    Scheduler,
    SlicesPerShard,
    SplitName,
    Workers,
)
from data_prep.shards.tables import MANIFEST, REJECTED
from data_prep.shards.write import Summary, write_shards
from data_prep.sources.ct_rate import find_ct_rate
from data_prep.sources.folders import find_series, find_volumes
from data_prep.sources.rad_chestct import find_rad_chestct
from data_prep.sources.rexgroundingct import read_annotations
from data_prep.sources.source_volume import SourceVolume


def ct_rate(
    root: CTRateRoot,
    split: Annotated[Literal["train", "valid"], typer.Option(help="Split to convert.")],
    out: Out,
    form: Annotated[
        Literal["auto", "v1", "v2"],
        typer.Option(help="v1: raw values, blank headers. v2 (_fixed): HU. auto: by folder, then header."),
    ] = "auto",
    totalsegmentator: CTRateMaps = None,
    rexgroundingct: Annotated[Path | None, typer.Option(help="ReXGroundingCT's dataset JSON.")] = None,
    rexgroundingct_masks: Annotated[Path | None, typer.Option(help="ReXGroundingCT's segmentations.")] = None,
    limit: FirstVolumes = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write CT-RATE into shards, with TotalSegmentator's and ReXGroundingCT's masks."""
    if (rexgroundingct is None) != (rexgroundingct_masks is None):
        raise ValueError(
            "--rexgroundingct and --rexgroundingct-masks must be given together, got one of them."
        )
    annotations = (
        read_annotations(rexgroundingct, rexgroundingct_masks)
        if rexgroundingct is not None and rexgroundingct_masks is not None
        else None
    )
    sources, rejected = find_ct_rate(
        root, split, form=form, totalsegmentator=totalsegmentator, annotations=annotations
    )
    if limit is not None:
        sources = sources[:limit]
        last = sources[-1].volume if sources else ""
        rejected = [item for item in rejected if item.volume <= last]
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)


def rad_chestct(
    root: Annotated[
        Path, typer.Option(help="RAD-ChestCT as downloaded: npz volumes and CSV tables.", exists=True)
    ],
    split: Annotated[
        Literal["train", "valid", "test"], typer.Option(help="Split to convert: trn*, val* or tst*.npz.")
    ],
    out: Out,
    totalsegmentator: LabelMaps = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write RAD-ChestCT into shards, with the 16 classes that it shares with CT-RATE."""
    sources, rejected = find_rad_chestct(root, split, totalsegmentator)
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)


def nifti(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Volumes in HU (NIfTI, MetaImage, NRRD), with sub-folders.", metavar="IN", exists=True
        ),
    ],
    out: Out,
    split: SplitName = "train",
    masks: LabelMaps = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write a folder of volumes, one file each, into shards."""
    sources, rejected = find_volumes(folder, split, masks)
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)


def dicom(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Tree of DICOM files with any names, one slice per file.", metavar="IN", exists=True
        ),
    ],
    out: Out,
    split: SplitName = "train",
    masks: LabelMaps = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write every axial CT series of a tree of DICOM files into shards."""
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        sources, rejected = find_series(folder, split, client, masks=masks, progress=progress)
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)


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
    """Write a cohort into shards on a Dask cluster and show the outcome; the arguments are the options above.

    Raises:
        typer.Exit: with status 1 if too many volumes were rejected.
    """
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        here = [source.absolute() for source in sources]  # workers may run in another folder
        summary = write_shards(
            here,
            rejected,
            out.absolute(),
            split,
            client,
            slices_per_shard=slices_per_shard,
            progress=progress,
        )
    finish(summary, out, max_rejected)


def finish(summary: Summary, out: Path, max_rejected: float) -> None:
    """Show what became of the cohort; exit with status 1 if too much of it was rejected."""
    show_rows(f"Shards in {out}", _rows(summary))
    if summary.num_doubtful:
        console.print(
            f"{summary.num_doubtful} of {summary.num_volumes} volumes are doubtful: see column 'doubts' of "
            f"{out / MANIFEST}.",
            soft_wrap=True,
            markup=False,
        )
    left_out = f"; {len(summary.rejected):,} left out, listed in {REJECTED}" if summary.rejected else ""
    what = f"{summary.num_volumes:,} volumes in {summary.num_shards:,} shards"
    console.print(f"Done: {what} in {out}{left_out}.", soft_wrap=True, markup=False)
    num_failures = sum(map(is_failure, summary.rejected))
    check_rejected(num_failures, summary.rejected_share, max_rejected)


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    yield "volumes", f"{summary.num_volumes:,}"
    yield "with TotalSegmentator ids", f"{summary.num_ts:,}"
    yield "annotated by ReXGroundingCT", f"{summary.num_rex:,}"
    yield "slices", f"{summary.num_slices:,}"
    yield "shards", f"{summary.num_shards:,}"
    yield "MB", f"{summary.num_bytes / 1e6:,.1f}"
    if summary.num_volumes:
        yield "MB per volume", f"{summary.num_bytes / 1e6 / summary.num_volumes:,.1f}"
    if summary.num_resumed:
        yield "done before: volumes", f"{summary.num_resumed:,}"
        yield "done before: shards", f"{summary.num_resumed_shards:,}"
    if summary.num_workers:
        yield "volumes per minute", f"{summary.num_done / summary.seconds * 60:,.1f}"
        yield "workers", f"{summary.num_workers:,}"
        yield "peak memory of a worker, MB", f"{summary.peak_worker_bytes / 1e6:,.0f}"
    for reason, count in sorted(summary.reasons.items()):
        yield f"left out: {reason}", f"{count:,}"
