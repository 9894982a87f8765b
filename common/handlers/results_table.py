"""The results of all evaluations in one tidy CSV, from which every table is printed.

``python -m common.handlers.results_table results/*.csv`` prints one row an encoder.
"""

import csv
import fcntl
import hashlib
import json
import math
import subprocess
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from ignite.engine import Engine, Events
from rich import box
from rich.console import Console
from rich.table import Table

from common.cohort.csv_table import table_rows
from common.run.atomic_file import atomic_file
from common.run.short_errors import short_errors

if TYPE_CHECKING:  # printing a table needs no MONAI, which takes seconds to import
    from common.engines.probe_grid import ProbeGridTrainer

FIELDS = (
    "encoder",
    "protocol",
    "dataset",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "seeds",
    "commit",
    "config_hash",
)
KEY = ("encoder", "protocol", "dataset", "metric")
COLUMNS = {
    "macro_auroc": "AUROC",
    "macro_auprc": "AUPRC",
    "macro_f1": "F1",
    "macro_balanced_accuracy": "BA",
}


class ResultsTable:
    """Add the test results of a :class:`ProbeGridTrainer` to a results CSV when it has completed.

    Four rows for the encoder and four for "prevalence", the floor on the same volumes, with the bootstrap's
    95 % intervals as low and high. Four more, of protocol ``<protocol>_seeds``, where the chosen probe was
    trained with several seeds: the mean, the lowest and the highest of them.

    Args:
        path: CSV of all evaluations; made when missing.
        protocol: name of the evaluation.
        dataset: name of the data.
        seed: seed of the run.
        config: settings that the numbers depend on, JSON values; their hash goes into the rows.
    """

    def __init__(
        self, path: str | Path, protocol: str, dataset: str, seed: int, config: dict[str, Any]
    ) -> None:
        self.path = Path(path)
        self.protocol = protocol
        self.dataset = dataset
        self.seed = seed
        self.config = config

    def attach(self, engine: Engine) -> None:
        """Register with a ``ProbeGridTrainer``."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: "ProbeGridTrainer") -> None:
        if getattr(engine.state, "stopped_early", False):
            return
        state, encoder = engine.state, engine.test_bags.identity["encoder"]
        common = {
            "dataset": self.dataset,
            "n": str(len(engine.test_bags)),
            "commit": code_version(),
            "config_hash": config_hash(self.config),
        }
        rows = []
        for subject, name, seeds in (("probe", encoder, str(self.seed)), ("prevalence", "prevalence", "")):
            for metric, value in state.reports[subject]["macro"].items():
                low, high = state.intervals[subject]["macro"][metric]
                rows.append(_row(name, self.protocol, metric, (value, low, high), seeds) | common)
        seeds = " ".join(map(str, [self.seed, *engine.further_seeds]))
        for metric in state.reports["probe"]["macro"] if engine.further_seeds else ():
            values = [report["macro"][metric] for report in state.seed_reports]
            numbers = (fmean(values), min(values), max(values))
            rows.append(_row(encoder, f"{self.protocol}_seeds", metric, numbers, seeds) | common)
        add_rows(self.path, rows)


def _row(
    encoder: str, protocol: str, metric: str, numbers: tuple[float, float, float], seeds: str
) -> dict[str, str]:
    value, low, high = (f"{number:.6f}" for number in numbers)
    row = {"encoder": encoder, "protocol": protocol, "metric": f"macro_{metric}", "value": value}
    return row | {"low": low, "high": high, "seeds": seeds}


def add_rows(path: str | Path, rows: list[dict[str, str]]) -> None:
    """Add rows to a results CSV; a row of the same encoder, protocol, dataset and metric is replaced.

    The file is written anew and appears only when whole. A lock beside it keeps two evaluations from losing
    each other's rows.

    Args:
        path: CSV to add to; made when missing.
        rows: values for all of ``FIELDS``.

    Raises:
        ValueError: if a row or the present file has other columns.
    """
    path = Path(path)
    for row in rows:
        if set(row) != set(FIELDS):
            raise ValueError(f"row must have the columns {FIELDS}, got {tuple(row)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        present = read_rows(path) if path.is_file() else []
        by_key = {tuple(row[name] for name in KEY): row for row in [*present, *rows]}
        with atomic_file(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(by_key.values())


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read a results CSV.

    Args:
        path: file of :func:`add_rows`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no CSV in UTF-8, or has other columns or a value that is no number.
    """
    rows = list(table_rows(path, "results", FIELDS))
    for row in rows:
        if set(row) != set(FIELDS):
            raise ValueError(f"results must have the columns {FIELDS}, got {list(row)} in '{path}'.")
        try:
            _numbers(row)
        except ValueError as error:
            raise ValueError(f"value, low and high must be numbers, got {row} in '{path}'.") from error
    return rows


def results_table(rows: list[dict[str, str]]) -> Table:
    """Lay out results as a table: one row an encoder, protocol and dataset, one column a macro metric.

    Args:
        rows: rows of :func:`read_rows`.
    """
    table = Table(title="Macro means over the classes of the test set", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("encoder", "protocol", "dataset"):
        table.add_column(name, no_wrap=True)
    for name in (*COLUMNS.values(), "volumes"):
        table.add_column(name, justify="right", no_wrap=True)
    values = {tuple(row[name] for name in KEY): _cell(row) for row in rows}
    counts = {tuple(row[name] for name in KEY[:3]): row["n"] for row in rows}
    for group, count in counts.items():
        table.add_row(*group, *(values.get((*group, metric), "") for metric in COLUMNS), count)
    return table


def print_whole(table: Table) -> None:
    """Print a table as wide as it is, in a log as well.

    Args:
        table: what to print.
    """
    console = Console()
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)


def code_version() -> str:
    """Return the git commit of this code, ``-dirty`` if files differ; "unknown" outside a checkout."""
    here = Path(__file__).resolve()
    if (
        _git("ls-files", "--error-unmatch", here.name) is None
    ):  # git may know the folder around an unzipped bundle
        return "unknown"
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"


def config_hash(config: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that stand for a configuration, in any order of its keys.

    Args:
        config: JSON values.

    Example:
        >>> config_hash({"seed": 42, "lr": 0.1}) == config_hash({"lr": 0.1, "seed": 42}) != config_hash({})
        True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).resolve().parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _cell(row: dict[str, str]) -> str:
    value, low, high = _numbers(row)
    if math.isnan(value):
        return "undefined"
    # on a line of its own: four intervals side by side are wider than a terminal
    return f"{value:.4f}" if math.isnan(low) or math.isnan(high) else f"{value:.4f}\n{low:.3f}-{high:.3f}"


def _numbers(row: dict[str, str]) -> tuple[float, float, float]:
    return float(row["value"]), float(row["low"] or "nan"), float(row["high"] or "nan")


def main(paths: Annotated[list[Path], typer.Argument(help="results CSVs, such as results/*.csv")]) -> None:
    """Print the results of the given CSVs as one table."""
    short_errors()
    print_whole(results_table([row for path in paths for row in read_rows(path)]))


if __name__ == "__main__":
    typer.run(main)
