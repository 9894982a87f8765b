"""``dense-labels``: what every patch of CT-RATE's annotated scans shows, for Table I."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from common.ct.geometry import is_failure
from common.run.process import atomic_file
from data_prep.cluster import dask_client
from data_prep.commands.console import console, progress_bars
from data_prep.commands.options import Scheduler, Workers
from data_prep.ct_rate import find_ct_rate
from data_prep.dense_labels import write_all
from data_prep.rexgroundingct import read_annotations


def dense_labels(
    root: Annotated[Path, typer.Option(help="CT-RATE as downloaded: the folder that holds dataset/.")],
    rexgroundingct: Annotated[Path, typer.Option(help="ReXGroundingCT's dataset JSON.")],
    rexgroundingct_masks: Annotated[Path, typer.Option(help="ReXGroundingCT's segmentations.")],
    out: Annotated[Path, typer.Option(help="Folder for <volume>.safetensors.")],
    split: Annotated[Literal["train", "valid"], typer.Option(help="Split to label.")] = "valid",
    totalsegmentator: Annotated[
        Path | None,
        typer.Option(help="Label maps. Default: dataset/ts_seg/ts_total/<split>_fixed."),
    ] = None,
    grid: Annotated[
        int, typer.Option(help="Patches along a side of the cropped image: 256 / 16, or 252 / 14.", min=1)
    ] = 16,
    limit: Annotated[int | None, typer.Option(help="Label the first N volumes only.", min=1)] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Count which organs and findings every patch shows, through the body crop of the image.

    Scans that ReXGroundingCT annotated and that have a label map count. Labels that are there are kept.
    ``volumes.csv`` beside them lists what is labelled: --subset_csv of the encoder bundles.
    """
    annotations = read_annotations(rexgroundingct, rexgroundingct_masks)
    sources, rejected = find_ct_rate(root, split, "auto", totalsegmentator, annotations)
    sources = [source for source in sources if source.rex is not None][:limit]
    if not sources:
        raise ValueError(f"split '{split}' must have scans that ReXGroundingCT annotated, got none.")
    out.mkdir(parents=True, exist_ok=True)
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        failed = write_all(client, sources, out.absolute(), grid, progress)
    left_out = [item for item in rejected if item.volume in annotations] + failed
    labelled = sorted(file.stem for file in out.glob("*.safetensors"))
    with atomic_file(out / "volumes.csv", "w", encoding="utf-8") as table:
        table.writelines(f"{line}\n" for line in ("VolumeName", *labelled))
    for item in left_out:
        console.print(f"[red]Left out:[/red] '{escape(item.volume)}': {escape(item.detail)}", soft_wrap=True)
    console.print(f"{len(sources) - len(failed)} volumes labelled in '{escape(str(out))}'.", soft_wrap=True)
    if any(is_failure(item) for item in left_out):
        raise typer.Exit(1)
