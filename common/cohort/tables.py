"""Tables as CSV files with a header, read with one-line errors."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.ct.names import unique_names, volume_name
from common.run.process import atomic_file


def table_rows(path: str | Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Read a CSV row by row; a column may come in addition, and what a short row lacks is empty.

    Args:
        path: CSV in UTF-8, with or without a byte order mark.
        name: what the table is called in errors, such as the knob that names it.
        columns: that it must have.

    Yields:
        Its rows, cells by the name of their column.

    Raises:
        FileNotFoundError: with the first row, if there is no such file.
        ValueError: with the first row, if the table lacks a column; with any, if the file is no CSV in UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be a CSV file, got '{path}', which does not exist.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restkey="", restval="", strict=True)
            header = rows.fieldnames
            missing = [column for column in columns if column not in (header or [])]
            if not missing:
                yield from rows
    except (UnicodeDecodeError, csv.Error) as error:  # a quote that is never closed ends as the latter
        raise ValueError(f"{name} must be a CSV file in UTF-8, got '{path}' ({error}).") from error
    if missing:
        raise ValueError(f"{name} must have the column '{missing[0]}', got {header} in '{path}'.")


def read_labels(labels_csv: str | Path, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a label table in the order of its rows.

    Args:
        labels_csv: CSV with a column ``VolumeName`` (name or path, with or without suffix) and one per class.
        class_names: columns to read, in this order; further columns are left alone.

    Returns:
        Volume to its labels: float32 ``(C,)`` of 0 and 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no CSV in UTF-8, a column is missing, a volume has two rows, or a label is
            neither 0 nor 1.
    """
    path = Path(labels_csv)
    labels: dict[str, np.ndarray] = {}
    rows = list(table_rows(path, "labels_csv", ("VolumeName", *class_names)))
    places = [Path(row["VolumeName"].strip().replace("\\", "/")) for row in rows]
    names = unique_names(places)
    for place, row in zip(places, rows, strict=True):
        volume = names[place]
        if volume in labels:
            raise ValueError(
                f"labels_csv must have one row per volume, got two for volume '{volume}' in '{path}'."
            )
        labels[volume] = np.array([_binary(row, name, path) for name in class_names], dtype=np.float32)
    return labels


def _binary(row: dict[str, str], name: str, path: Path) -> float:
    value = row[name].strip()
    if value not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(
            f"label must be 0 or 1, got {value!r} of '{name}' for volume '{row['VolumeName']}' in '{path}'."
        )
    return float(value)


HEADINGS = set(
    "volumename volume volumes volumeid name names filename file files path id image imageid scan scanid "
    "seriesinstanceuid seriesuid noteaccdeid volumeaccdeid".split()
)
"""What the column of names may be called, in lower case, without blanks and ``_``."""


def listed_names(listing: str | Path, knob: str) -> list[str]:
    """Read the names that a file lists, one per line, or in a table's column ``VolumeName`` or its first.

    Args:
        listing: text, or CSV with commas, semicolons or tabs; with or without a line of column names.
        knob: what the file is called in errors.

    Returns:
        Names or paths as they are written, without quotes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text in UTF-8.
    """
    path = Path(listing)
    if not path.is_file():
        raise FileNotFoundError(f"{knob} must be a text file, got '{path}', which does not exist.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [row for row in _rows(path, lines) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{knob} must be text in UTF-8, got '{path}' ({error}).") from error
    heading = [re.sub(r"[\s_]", "", cell).lower() for cell in rows[0]] if rows else [""]
    column = heading.index("volumename") if "volumename" in heading else 0
    rows = rows[1:] if heading[column] in HEADINGS else rows
    names = (row[column].strip() for row in rows if len(row) > column)
    return [name for name in names if name]


def _rows(path: Path, lines: list[str]) -> Iterable[list[str]]:
    """Split the lines of a table into cells; those of any other text are a name each."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return ([line.strip(" \t\"'")] for line in lines)
    return csv.reader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",")


def listed_volumes(listing: str | Path) -> set[str]:
    """Read the volumes that a file lists, such as CT-RATE's ``no_chest_*.txt``.

    Args:
        listing: see ``listed_names``.

    Returns:
        Volume names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text in UTF-8.
    """
    return {volume_name(name) for name in listed_names(listing, "skip_list")}


# N volumes, C classes


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
