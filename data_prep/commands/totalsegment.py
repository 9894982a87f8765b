"""``totalsegment``: TotalSegmentator's label maps for a folder of CTs."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from common.ct.rejection import RejectedVolume
from data_prep.commands.console import check_rejected, console, progress_bars, show_rows
from data_prep.commands.options import MaxRejected
from data_prep.tables import write_table
from data_prep.totalsegment import find_cts, part_of, segment_all, totalsegmentator_ready


def totalsegment(
    folder: Annotated[
        Path, typer.Argument(help="NIfTI in HU or RAD-ChestCT's npz, with sub-folders.", metavar="IN")
    ],
    out: Annotated[Path, typer.Option(help="Folder for <volume>.nii.gz, outside IN.")],
    device: Annotated[str, typer.Option(help="gpu, gpu:1 (the second one) or cpu.")] = "gpu",
    fast: Annotated[
        bool, typer.Option("--fast", help="Use the 3 mm model instead of 1.5 mm: faster, coarser organs.")
    ] = False,
    part: Annotated[
        str | None, typer.Option(help="Every n-th volume, such as 1/4 in the first of 4 processes.")
    ] = None,
    max_rejected: MaxRejected = 0.01,
) -> None:
    """Segment CTs with TotalSegmentator (task total): one label map per volume, on the volume's grid.

    Existing label maps are kept, so you can stop and start it again; use another --out for another --fast.
    TotalSegmentator's usage statistics are off. Weights are downloaded the first time, or read from
    TOTALSEG_WEIGHTS_PATH.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out must lie outside '{folder}', where it would be taken for CTs, got '{out}'.")
    sources, rejected = find_cts(folder)
    table = out / "rejected.csv"
    if part is not None:
        sources = part_of(sources, part)
        table = out / f"rejected-{part.replace('/', 'of')}.csv"
    out.mkdir(parents=True, exist_ok=True)
    with totalsegmentator_ready(device, fast), progress_bars() as progress:
        outcome = segment_all(sources, out, device=device, fast=fast, progress=progress)
    rejected += outcome.rejected
    write_table(table, RejectedVolume._fields, sorted(rejected))
    counts = Counter(item.reason for item in rejected)
    rows = [("segmented", f"{outcome.num_segmented:,}"), ("there before", f"{outcome.num_kept:,}")]
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in sorted(counts.items())]
    show_rows(f"Label maps in {out}", rows)
    if rejected:
        console.print(f"Volumes that were left out are listed in {table}.", soft_wrap=True, markup=False)
    share = len(rejected) / max(1, outcome.num_segmented + outcome.num_kept + len(rejected))
    check_rejected(len(rejected), share, max_rejected)
