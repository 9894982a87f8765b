"""``pos-weights``: class frequencies of the masks in shards, and the weights that follow."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.shards.shards import ShardSet
from data_prep.cluster import dask_client
from data_prep.commands.console import console, progress_bars
from data_prep.commands.options import Scheduler, Shards, Workers
from data_prep.pos_weights import (
    ClassWeight,
    MaskCounts,
    class_weights,
    count_shards,
    never_seen,
    write_weights,
)


def pos_weights(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for totalsegmentator.csv and rexgroundingct.csv.")],
    split: Annotated[str, typer.Option(help="Split whose masks to count.")] = "train",
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Count how frequent organs and findings are, and weight their positives by it."""
    paths = list(dict.fromkeys(entry.shard for entry in ShardSet(shards.absolute(), split).volumes))
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        totals, failed = count_shards(client, paths, progress)
    out.mkdir(parents=True, exist_ok=True)
    for name, counts in totals.items():
        if counts.num_volumes == 0:
            console.print(f"No volume of split '{escape(split)}' has masks of {name}: no weights for it.")
            continue
        weights = class_weights(name, counts)
        _show(name, weights, counts)
        write_weights(out / f"{name}.csv", weights)
    for shard, message in sorted(failed.items()):
        console.print(f"[red]Left out:[/red] '{escape(shard)}': {escape(message)}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _show(name: str, weights: list[ClassWeight], counts: MaskCounts) -> None:
    table = Table("class", title=f"{name}: {counts.num_volumes:,} volumes, {counts.num_without:,} without")
    for column in ("share of cells", "by frequency", "weight", "in use"):
        table.add_column(column, justify="right")
    for weight in weights:
        table.add_row(
            f"{weight.label.code} {weight.label.name}".strip(),
            f"{weight.frequency:.4%}",
            f"{weight.weight_by_frequency:,.2f}",
            f"{weight.pos_weight:,.2f}",
            f"{weight.label.pos_weight:,.2f}",
        )
    Console().print(table)
    unseen = never_seen(weights)
    if unseen:
        console.print(f"Never seen: {', '.join(unseen)}.", soft_wrap=True)
