"""``nifti``: any folder of volumes in HU, one file each, into shards."""

from pathlib import Path
from typing import Annotated

import typer

from data_prep.commands.options import MaxRejected, Out, Scheduler, SlicesPerShard, Workers


def nifti(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Volumes in HU (NIfTI, MetaImage, NRRD), with sub-folders.", metavar="IN", exists=True
        ),
    ],
    out: Out,
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    masks: Annotated[
        Path | None, typer.Option(help="TotalSegmentator label maps named like the volumes.")
    ] = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write a folder of volumes, one file each, into shards."""
    from data_prep.commands.prepare import prepare
    from data_prep.nifti import find_volumes

    sources, rejected = find_volumes(folder, split, masks)
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)
