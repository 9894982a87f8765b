"""Labels of volumes, as CT-RATE publishes them: a CSV with one row a volume and one column a class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.cohort.csv_table import table_rows
from common.ct.names import unique_names


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
