"""What evaluations measure: rows of one tidy CSV, predictions per volume, MLflow runs and a printed table."""

# N volumes, C classes

import csv
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from common.cohort.cohort import table_rows
from common.run.config import code_version, experiment_id
from common.run.process import atomic_file, locked

NAN = math.nan
PREDICTION_COLUMNS = ("encoder", "volume", "class", "probability", "threshold", "label")
MACRO_COLUMNS = {
    "macro_auroc": "AUROC",
    "macro_auprc": "AUPRC",
    "macro_f1": "F1",
    "macro_balanced_accuracy": "BA",
}
"""Metrics of the printed tables, and the heads of their columns."""
Numbers = dict[str, tuple[float, float, float]]
"""Metric to value and the ends of its interval."""
MAX_METRICS_PER_CALL = 1000  # MLflow's limit on a batch


class ResultRow(NamedTuple):
    """One measured number and where it comes from. Its fields are the columns of the CSV, in order."""

    encoder: str  # whose embeddings were evaluated, or "prevalence", the floor
    protocol: str  # name of the evaluation
    dataset: str
    metric: str
    value: float  # nan where it is undefined
    low: float = NAN  # lower end of the 95 % interval; nan without one
    high: float = NAN
    n: int = 0  # test volumes
    seeds: str = ""  # of training, separated by blanks
    commit: str = ""  # version of the code
    config_hash: str = ""  # of the settings

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
    """Make the rows of one evaluation by this code, one per metric.

    ``numbers`` maps a metric to its value, low and high, the latter two nan without an interval; the hash of
    ``config``, JSON values that the numbers depend on, goes into the rows.
    """
    commit, settings = code_version(), config_hash(config)
    return [
        ResultRow(encoder, protocol, dataset, name, *ends, n, seeds, commit, settings)
        for name, ends in numbers.items()
    ]


def add_rows(path: str | Path, rows: Sequence[ResultRow]) -> None:
    """Add rows to a results CSV; a row of the same encoder, protocol, dataset and metric is replaced.

    The file is made when missing. It is rewritten and appears only when whole; other rows keep their text. A
    lock beside it keeps two evaluations from losing each other's rows.

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
    """Read a results CSV of :func:`add_rows`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a CSV in UTF-8, has other columns, or holds text where a number belongs.
    """
    return [row for _, row in _read(path)]


def _read(path: str | Path) -> list[tuple[list[str], ResultRow]]:
    """Return each row as its text in the file, and as what it means."""
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
    """Return twelve hexadecimal digits that stand for JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


class Predictions(NamedTuple):
    """What one probe predicts for a set of volumes, and what is true."""

    encoder: str  # whose embeddings the probe reads
    volumes: list[str]  # N names
    class_names: list[str]  # C names
    probabilities: NDArray[np.float64]  # (N, C)
    thresholds: NDArray[np.float64]  # (C,); a class is called positive from this probability on
    labels: NDArray[np.float64]  # (N, C), 0 or 1


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write predictions as a CSV with one row per volume and class; its numbers read back bit by bit."""
    encoder, volumes, class_names, probabilities, thresholds, labels = predictions
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(PREDICTION_COLUMNS)
        for volume, row, truth in zip(volumes, probabilities.tolist(), labels.tolist(), strict=True):
            cells = zip(class_names, row, thresholds.tolist(), truth, strict=True)
            writer.writerows((encoder, volume, name, p, t, int(label)) for name, p, t, label in cells)


def read_predictions(path: str | Path) -> Predictions:
    """Read a file of :func:`write_predictions`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a CSV in UTF-8, lacks a column, does not have one row per volume and
            class, or holds text where a number belongs.
    """
    rows = list(table_rows(path, "predictions", PREDICTION_COLUMNS))
    if not rows:
        raise ValueError(f"No predictions in '{path}': it has a header only.")
    columns = ([row[column] for row in rows] for column in PREDICTION_COLUMNS)
    encoders, of_row, class_of_row, *numbers = columns
    volumes, class_names = list(dict.fromkeys(of_row)), list(dict.fromkeys(class_of_row))
    expected = [(volume, name) for volume in volumes for name in class_names]
    if list(zip(of_row, class_of_row, strict=True)) != expected:
        raise ValueError(
            f"predictions must have one row for each volume and class, volume by volume, got {len(rows)} "
            f"rows of {len(volumes)} volumes and {len(class_names)} classes in '{path}'."
        )
    shape = (len(volumes), len(class_names))
    try:
        probabilities, thresholds, labels = (
            np.array(cells, dtype=np.float64).reshape(shape) for cells in numbers
        )
    except ValueError as error:
        raise ValueError(f"Cannot read '{path}': {error} in a column of numbers.") from error
    return Predictions(encoders[0], volumes, class_names, probabilities, thresholds[0], labels)


def log_rows(rows: Sequence[ResultRow], tracking_uri: str, experiment: str) -> None:
    """Record results of one encoder as a finished MLflow run: metrics ``<protocol>/<metric>``, their origin.

    An interval becomes two more metrics, ``..._low`` and ``..._high``. Undefined values are left out.

    Raises:
        ValueError: if there is no row, or they are of several encoders or data sets.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read by MLflow when it is imported
    from mlflow.entities import Metric, Param, RunStatus
    from mlflow.tracking import MlflowClient

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


def results_table(rows: Sequence[ResultRow]) -> Table:
    """Lay out results as a table: a row per encoder, protocol and dataset, a column per macro metric."""
    table = Table(title="Macro means over the classes of the test set", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("encoder", "protocol", "dataset"):
        table.add_column(name, no_wrap=True)
    for name in (*MACRO_COLUMNS.values(), "volumes"):
        table.add_column(name, justify="right", no_wrap=True)
    cells = {row.key: _cell(*row.numbers) for row in rows}
    counts = {row.key[:3]: row.n for row in rows}
    for group, count in counts.items():
        table.add_row(*group, *(cells.get((*group, metric), "") for metric in MACRO_COLUMNS), str(count))
    return table


def _cell(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "undefined"
    # on a separate line: four intervals side by side are wider than a terminal
    return f"{value:.4f}" if math.isnan(low) or math.isnan(high) else f"{value:.4f}\n{low:.3f}-{high:.3f}"


def print_whole(table: Table) -> None:
    """Print a table at its full width, in a log as well."""
    console = Console()
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    Console(width=max(console.width, needed)).print(table)
