"""The results of all evaluations in one tidy CSV: what a row is, and how rows are made, added and read."""

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from mlflow.entities import Metric, Param, RunStatus  # noqa: E402 (see above)
from mlflow.tracking import MlflowClient  # noqa: E402 (see above)
from rich import box
from rich.console import Console
from rich.table import Table

from common.cohort.tables import table_rows
from common.run.config import code_version, experiment_id, short_errors
from common.run.process import atomic_file, locked

NAN = math.nan


class ResultRow(NamedTuple):
    """One measured number and where it comes from. Its fields are the columns of the CSV, in order.

    Attributes:
        encoder: whose embeddings were evaluated, or "prevalence", the floor.
        protocol: name of the evaluation.
        dataset: name of the data.
        metric: what was measured.
        value: the number; nan where it is undefined.
        low: lower end of its 95 % interval; nan without one.
        high: upper end; nan without one.
        n: number of test volumes.
        seeds: seeds of training, separated by blanks.
        commit: version of the code, of :func:`common.run.config.code_version`.
        config_hash: stands for the settings, of :func:`config_hash`.
    """

    encoder: str
    protocol: str
    dataset: str
    metric: str
    value: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    seeds: str = ""
    commit: str = ""
    config_hash: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies the row: encoder, protocol, dataset and metric."""
        return self[:4]

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Value, low and high."""
        return self.value, self.low, self.high


FIELDS = ResultRow._fields


def result_rows(
    numbers: Mapping[str, tuple[float, float, float]],
    *,
    encoder: str,
    protocol: str,
    dataset: str,
    n: int,
    config: Mapping[str, Any],
    seeds: str = "",
) -> list[ResultRow]:
    """Make the rows of one evaluation, one per metric.

    Args:
        numbers: metric to value, low and high; the latter two nan without an interval.
        encoder: whose embeddings were evaluated.
        protocol: name of the evaluation.
        dataset: name of the data.
        n: number of test volumes.
        config: settings that the numbers depend on, JSON values; their hash goes into the rows.
        seeds: seeds of training.
    """
    commit, settings = code_version(), config_hash(config)
    return [
        ResultRow(
            encoder, protocol, dataset, metric, *ends, n=n, seeds=seeds, commit=commit, config_hash=settings
        )
        for metric, ends in numbers.items()
    ]


def add_rows(path: str | Path, rows: Sequence[ResultRow]) -> None:
    """Add rows to a results CSV; a row of the same encoder, protocol, dataset and metric is replaced.

    The file is written anew and appears only when whole; other rows keep their text. A lock beside it keeps
    two evaluations from losing each other's rows.

    Args:
        path: CSV to add to; made when missing.
        rows: what to add.

    Raises:
        ValueError: if the present file is not a results CSV.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        by_key = {row.key: cells for cells, row in (_read(path) if path.is_file() else [])}
        by_key |= {row.key: _cells(row) for row in rows}
        with atomic_file(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([FIELDS, *by_key.values()])


def read_rows(path: str | Path) -> list[ResultRow]:
    """Read a results CSV.

    Args:
        path: file of :func:`add_rows`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a CSV in UTF-8, has other columns, or holds text where a number belongs.
    """
    return [row for _, row in _read(path)]


def _read(path: str | Path) -> list[tuple[list[str], ResultRow]]:
    """Rows as they stand in the file, and what they mean."""
    found = []
    for cells in table_rows(path, "results", FIELDS):
        if set(cells) != set(FIELDS):
            raise ValueError(f"results must have the columns {FIELDS}, got {list(cells)} in '{path}'.")
        encoder, protocol, dataset, metric, value, low, high, n, *origin = texts = [cells[f] for f in FIELDS]
        try:
            numbers = (float(value), float(low or NAN), float(high or NAN), int(n or 0))
        except ValueError as error:
            raise ValueError(f"value, low, high and n must be numbers, got {cells} in '{path}'.") from error
        found.append((texts, ResultRow(encoder, protocol, dataset, metric, *numbers, *origin)))
    return found


def _cells(row: ResultRow) -> list[str]:
    ends = ["" if math.isnan(end) else f"{end:.6g}" for end in (row.low, row.high)]
    return [*row.key, f"{row.value:.6g}", *ends, str(row.n), row.seeds, row.commit, row.config_hash]


def config_hash(config: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that stand for a configuration, whatever the order of its keys.

    Args:
        config: JSON values.

    Example:
        >>> config_hash({"seed": 42, "lr": 0.1}) == config_hash({"lr": 0.1, "seed": 42}) != config_hash({})
        True
    """
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported


MAX_METRICS_PER_CALL = 1000  # MLflow's own limit on a batch


def log_rows(rows: Sequence[ResultRow], tracking_uri: str, experiment: str) -> None:
    """Record results of one encoder as a finished MLflow run: metrics ``<protocol>/<metric>``, their origin.

    An interval becomes two more metrics, ``..._low`` and ``..._high``. An undefined value is left out, which
    says the same.

    Args:
        rows: results, all of one encoder and data set.
        tracking_uri: MLflow store or server.
        experiment: experiment to put the run in, made when missing.

    Raises:
        ValueError: if there is no row, or they are of several encoders or data sets.
    """
    origins = {(row.encoder, row.dataset) for row in rows}
    if len(origins) != 1:
        raise ValueError(f"rows must be of one encoder and data set, got {sorted(origins)}.")
    client = MlflowClient(tracking_uri)
    run = client.create_run(experiment_id(client, tracking_uri, experiment), run_name=rows[0].encoder)
    names = ("encoder", "dataset", "n", "seeds", "commit", "config_hash")
    client.log_batch(run.info.run_id, params=[Param(name, str(getattr(rows[0], name))) for name in names])
    milliseconds = int(time.time() * 1000)
    metrics = [
        Metric(f"{row.protocol}/{row.metric}{suffix}", number, milliseconds, 0)
        for row in rows
        for number, suffix in zip(row.numbers, ("", "_low", "_high"), strict=True)
        if math.isfinite(number)
    ]
    for first in range(0, len(metrics), MAX_METRICS_PER_CALL):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + MAX_METRICS_PER_CALL])
    client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.FINISHED))


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
