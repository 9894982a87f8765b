"""Results CSVs printed as one table: ``python -m common.reports.results_table results/*.csv``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from common.reports.results_csv import ResultRow, read_rows
from common.run.short_errors import short_errors

COLUMNS = {
    "macro_auroc": "AUROC",
    "macro_auprc": "AUPRC",
    "macro_f1": "F1",
    "macro_balanced_accuracy": "BA",
}


def results_table(rows: Sequence[ResultRow]) -> Table:
    """Lay out results as a table: a row per encoder, protocol and dataset, a column per macro metric.

    Args:
        rows: rows of a results CSV.
    """
    table = Table(title="Macro means over the classes of the test set", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("encoder", "protocol", "dataset"):
        table.add_column(name, no_wrap=True)
    for name in (*COLUMNS.values(), "volumes"):
        table.add_column(name, justify="right", no_wrap=True)
    cells = {row.key: _cell(*row.numbers) for row in rows}
    counts = {row.key[:3]: row.n for row in rows}
    for group, count in counts.items():
        table.add_row(*group, *(cells.get((*group, metric), "") for metric in COLUMNS), str(count))
    return table


def print_whole(table: Table) -> None:
    """Print a table at its full width, in a log as well.

    Args:
        table: what to print.
    """
    console = Console()
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)


def _cell(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "undefined"
    # on a line of its own: four intervals side by side are wider than a terminal
    return f"{value:.4f}" if math.isnan(low) or math.isnan(high) else f"{value:.4f}\n{low:.3f}-{high:.3f}"


def main(paths: Annotated[list[Path], typer.Argument(help="results CSVs, such as results/*.csv")]) -> None:
    """Print the results of the given CSVs as one table."""
    short_errors()
    print_whole(results_table([row for path in paths for row in read_rows(path)]))


if __name__ == "__main__":
    typer.run(main)
