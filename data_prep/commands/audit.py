"""``audit``: reads shards back and proves them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_prep.audit.checks import CHECKS, ERROR
from data_prep.audit.report import write_report
from data_prep.audit.run import audit_shards, draw_pictures, write_json
from data_prep.cluster import dask_client
from data_prep.commands.console import console, progress_bars
from data_prep.commands.options import Scheduler, Shards, Workers


def audit(
    shards: Shards,
    split: Annotated[str | None, typer.Option(help="Split to audit. Default: all.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Page to write, with a .json beside it. Default: SHARDS/audit.html.")
    ] = None,
    sheets: Annotated[int, typer.Option(help="Volumes of a random sample to draw.", min=0)] = 12,
    sample: Annotated[
        float,
        typer.Option(
            help="Share of the volumes to decode and look at; names, bytes, order and records: of all.",
            min=0,
            max=1,
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the random samples.")] = 0,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Read shards back, prove that they are what was written, and show them on one page.

    Exit status 1 if the shards cannot be trusted; volumes that only look strange are listed, with status 0.
    """
    path = report or shards / "audit.html"
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"report must be in a folder that exists, got '{path}'.")
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        result = audit_shards(shards, split, client, share=sample, seed=seed, progress=progress)
        pictures, suspects = draw_pictures(result, client, sheets, seed=seed, progress=progress)
    write_report(result, pictures, suspects, path)
    write_json(result, path.with_suffix(".json"))
    table = Table("Check", "Looked at", "Failed", "First", title=f"Shards in {escape(str(shards))}")
    for check in CHECKS:
        failed = result.tally.failed[check.name]
        first = result.tally.offences[check.name][0] if failed else None
        if failed or check.level == ERROR:
            table.add_row(
                check.claim,
                f"{result.tally.checked[check.name]:,}",
                f"[{'red' if check.level == ERROR else 'yellow'}]{failed:,}" if failed else "",
                escape(f"{first.where}: {first.what}") if first else "",
            )
    Console().print(table)
    console.print(f"The report is {path}.", soft_wrap=True, markup=False)
    if result.tally.has_errors:
        raise typer.Exit(1)
