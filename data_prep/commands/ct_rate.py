"""``ct-rate``: a CT-RATE download into shards."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from data_prep.commands.options import MaxRejected, Out, Scheduler, SlicesPerShard, Workers


def ct_rate(
    root: Annotated[
        Path, typer.Option(help="CT-RATE as downloaded: the folder that holds dataset/.", exists=True)
    ],
    split: Annotated[Literal["train", "valid"], typer.Option(help="Split to convert.")],
    out: Out,
    form: Annotated[
        Literal["auto", "v1", "v2"],
        typer.Option(help="v1: raw values, blank headers. v2 (_fixed): HU. auto: by folder, then header."),
    ] = "auto",
    totalsegmentator: Annotated[
        Path | None,
        typer.Option(help="Label maps. Default: dataset/ts_seg/ts_total/<split>_fixed if present."),
    ] = None,
    rexgroundingct: Annotated[Path | None, typer.Option(help="ReXGroundingCT's dataset JSON.")] = None,
    rexgroundingct_masks: Annotated[Path | None, typer.Option(help="ReXGroundingCT's segmentations.")] = None,
    limit: Annotated[int | None, typer.Option(help="Convert the first N volumes only.", min=1)] = None,
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
    from data_prep.commands.prepare import prepare
    from data_prep.ct_rate import find_ct_rate
    from data_prep.rexgroundingct import read_annotations

    annotations = (
        read_annotations(rexgroundingct, rexgroundingct_masks)
        if rexgroundingct is not None and rexgroundingct_masks is not None
        else None
    )
    sources, rejected = find_ct_rate(root, split, form, totalsegmentator, annotations)
    if limit is not None:
        sources = sources[:limit]
        last = sources[-1].volume if sources else ""
        rejected = [item for item in rejected if item.volume <= last]
    prepare(sources, rejected, out, split, slices_per_shard, max_rejected, workers, scheduler)
