"""``totalsegment``: TotalSegmentator's label maps for a folder of CTs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.commands.console import console, progress_bars
from data_prep.commands.options import MaxRejected
from data_prep.totalsegment import find_cts, part_of, segment_all, write_table
from data_prep.totalsegmentator_setup import totalsegmentator_ready


def totalsegment(
    folder: Annotated[
        Path, typer.Argument(help="NIfTI in HU or RAD-ChestCT's npz, with sub-folders.", metavar="IN")
    ],
    out: Annotated[Path, typer.Option(help="Folder for <volume>.nii.gz, outside of IN.")],
    device: Annotated[str, typer.Option(help="gpu, gpu:1 (the second one) or cpu.")] = "gpu",
    fast: Annotated[
        bool, typer.Option("--fast", help="The model of 3 mm in place of 1.5 mm: faster, coarser organs.")
    ] = False,
    part: Annotated[
        str | None, typer.Option(help="Every n-th volume, such as 1/4 in the first of 4 processes.")
    ] = None,
    max_rejected: MaxRejected = 0.01,
) -> None:
    """Segment CTs with TotalSegmentator (task total): a label map a volume, on the volume's grid.

    Label maps that are there are kept, so stop it and start it again; take another --out for another --fast.
    TotalSegmentator's usage statistics are off. Weights are downloaded the first time, or read from
    TOTALSEG_WEIGHTS_PATH.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out must lie outside of '{folder}', where it would be taken for CTs, got '{out}'.")
    sources, rejected = find_cts(folder)
    table_name = "rejected.csv"
    if part is not None:
        sources = part_of(sources, part)
        table_name = f"rejected-{part.replace('/', 'of')}.csv"
    out.mkdir(parents=True, exist_ok=True)
    with totalsegmentator_ready(device, fast), progress_bars() as progress:
        outcome = segment_all(sources, out, device, fast, progress)
    rejected += outcome.rejected
    write_table(out / table_name, rejected)
    table = Table(title=f"Label maps in {escape(str(out))}", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("segmented", f"{outcome.num_segmented:,}")
    table.add_row("there before", f"{outcome.num_kept:,}")
    for reason in sorted({item.reason for item in rejected}):
        table.add_row(f"left out: {reason}", f"{sum(item.reason == reason for item in rejected):,}")
    Console().print(table)
    share = len(rejected) / max(1, outcome.num_segmented + outcome.num_kept + len(rejected))
    if rejected:
        listed = escape(str(out / table_name))
        console.print(f"Volumes that were left out are listed in {listed}.", soft_wrap=True)
    if share > max_rejected:
        console.print(
            f"rejected volumes must be at most {max_rejected:.2%}, got {share:.2%} ({len(rejected)} "
            "volumes). Mend them, or raise --max-rejected.",
            soft_wrap=True,
        )
        raise typer.Exit(1)
