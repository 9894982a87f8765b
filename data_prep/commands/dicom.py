"""``dicom``: a folder tree of DICOM series into shards."""

from pathlib import Path
from typing import Annotated

import typer

from data_prep.cluster import dask_client
from data_prep.commands.console import progress_bars
from data_prep.commands.options import MaxRejected, Out, Scheduler, SlicesPerShard, Workers


def dicom(
    folder: Annotated[
        Path,
        typer.Argument(help="Tree of DICOM files of any names, one slice a file.", metavar="IN", exists=True),
    ],
    out: Out,
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    masks: Annotated[
        Path | None, typer.Option(help="TotalSegmentator label maps named by SeriesInstanceUID.")
    ] = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write every axial CT series of a folder tree of DICOM files into shards."""
    from data_prep.commands.prepare import prepare
    from data_prep.dicom_folder import find_series

    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        sources, rejected = find_series(folder, split, client, masks, progress)
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)
