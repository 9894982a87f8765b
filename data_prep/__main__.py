"""Command line: ``python -m data_prep --help``."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_prep.cohort_tables import REJECTED
from data_prep.ct_rate import find_ct_rate
from data_prep.nifti import find_volumes
from data_prep.phantom import phantom
from data_prep.rejection import is_failure
from data_prep.rexgroundingct import read_annotations
from data_prep.write_shards import Summary, write_shards

console = Console(stderr=True)
app = typer.Typer(
    help="Prepare chest CT datasets for pre-training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(phantom)

Out = Annotated[Path, typer.Option(help="Folder for shards, manifest.csv and rejected.csv.")]
SlicesPerShard = Annotated[
    int, typer.Option(help="A shard takes volumes until the next would exceed this.", min=1)
]
MaxRejected = Annotated[
    float, typer.Option(help="Share of rejected volumes past which the exit status is 1.", min=0, max=1)
]


@app.command(
    epilog="Example: python -m data_prep ct-rate --root /data/CT-RATE --split train --out /data/shards "
    "--rexgroundingct /data/ReX/dataset.json --rexgroundingct-masks /data/ReX/segmentations"
)
def ct_rate(
    root: Annotated[Path, typer.Option(help="CT-RATE as downloaded: the folder that holds dataset/.")],
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
    sources, rejected = find_ct_rate(root, split, form, totalsegmentator, annotations)
    with _progress() as progress:
        summary = write_shards(sources[:limit], rejected, out, split, slices_per_shard, progress)
    _finish(summary, out, max_rejected)


@app.command(epilog="Example: python -m data_prep nifti scans/ --out shards/ --masks label_maps/")
def nifti(
    folder: Annotated[Path, typer.Argument(help="NIfTI volumes in HU, with sub-folders.", metavar="IN")],
    out: Out,
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    masks: Annotated[
        Path | None, typer.Option(help="TotalSegmentator label maps with the volumes' file names.")
    ] = None,
    slices_per_shard: SlicesPerShard = 5000,
    max_rejected: MaxRejected = 0.01,
) -> None:
    """Write a folder of NIfTI volumes into shards."""
    sources, rejected = find_volumes(folder, split, masks)
    with _progress() as progress:
        summary = write_shards(sources, rejected, out, split, slices_per_shard, progress)
    _finish(summary, out, max_rejected)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage of the work, with the time it still takes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield show


def _finish(summary: Summary, out: Path, max_rejected: float) -> None:
    """Print what came of the cohort; leave with status 1 where too much of it was rejected."""
    table = Table(title=f"Shards in {escape(str(out))}", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in (
        ("volumes", f"{summary.num_volumes:,}"),
        ("with TotalSegmentator ids", f"{summary.num_ts:,}"),
        ("annotated by ReXGroundingCT", f"{summary.num_rex:,}"),
        ("slices", f"{summary.num_slices:,}"),
        ("shards (finished before)", f"{summary.num_shards:,} ({summary.num_resumed:,})"),
        ("MB", f"{summary.num_bytes / 1e6:,.1f}"),
        *((f"left out: {reason}", f"{count:,}") for reason, count in sorted(summary.reasons.items())),
    ):
        table.add_row(name, value)
    Console().print(table)
    if summary.rejected:
        listed = escape(str(out / REJECTED))
        console.print(f"Volumes that were left out are listed in {listed}.", soft_wrap=True)
    if summary.rejected_share > max_rejected:
        console.print(
            f"rejected volumes must be at most {max_rejected:.2%}, got {summary.rejected_share:.2%} "
            f"({sum(map(is_failure, summary.rejected))} volumes). Mend them, or raise --max-rejected.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a mistake in its input ends in one line rather than in a traceback."""
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
