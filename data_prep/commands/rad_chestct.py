"""``rad-chestct``: a RAD-ChestCT download into shards."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.commands.options import MaxRejected, Out, Scheduler, SlicesPerShard, Workers


def rad_chestct(
    root: Annotated[
        Path, typer.Option(help="RAD-ChestCT as downloaded: npz volumes and CSV tables.", exists=True)
    ],
    split: Annotated[
        Literal["train", "valid", "test"], typer.Option(help="Split to convert: trn*, val* or tst*.npz.")
    ],
    out: Out,
    totalsegmentator: Annotated[
        Path | None, typer.Option(help="TotalSegmentator label maps named like the volumes.")
    ] = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Write RAD-ChestCT into shards, with the 16 classes that it shares with CT-RATE."""
    from data_prep.commands.prepare import prepare
    from data_prep.rad_chestct_folder import find_rad_chestct

    sources, rejected = find_rad_chestct(root, split, totalsegmentator)
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)
