"""Predictions of a probe on a test set, in a plain CSV that other programs can read."""

# N volumes, C classes

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.cohort.csv_table import table_rows
from common.run.atomic_file import atomic_file

COLUMNS = ("encoder", "volume", "class", "probability", "threshold", "label")


class Predictions(NamedTuple):
    """What one probe predicts for a set of volumes, and what is true.

    Attributes:
        encoder: encoder whose embeddings the probe reads.
        volumes: N names.
        class_names: C names.
        probabilities: float64 ``(N, C)``.
        thresholds: float64 ``(C,)``; a class is called positive from this probability on.
        labels: float64 ``(N, C)`` of 0 and 1.
    """

    encoder: str
    volumes: list[str]
    class_names: list[str]
    probabilities: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    labels: NDArray[np.float64]


def write_predictions(path: str | Path, predictions: Predictions) -> None:
    """Write a CSV with one row per volume and class, whose numbers are read back as the same float64.

    Args:
        path: file to write or replace; its folder must exist.
        predictions: what to write.
    """
    encoder, volumes, class_names, probabilities, thresholds, labels = predictions
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for volume, row, truth in zip(volumes, probabilities.tolist(), labels.tolist(), strict=True):
            cells = zip(class_names, row, thresholds.tolist(), truth, strict=True)
            writer.writerows((encoder, volume, name, p, t, int(label)) for name, p, t, label in cells)


def read_predictions(path: str | Path) -> Predictions:
    """Read a file of :func:`write_predictions`.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a CSV in UTF-8, lacks a column, does not have one row per volume and
            class, or holds text where a number belongs.
    """
    rows = list(table_rows(path, "predictions", COLUMNS))
    if not rows:
        raise ValueError(f"No predictions in '{path}': it has a header only.")
    encoders, of_row, class_of_row, *numbers = ([row[column] for row in rows] for column in COLUMNS)
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
