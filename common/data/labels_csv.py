"""Labels of volumes, as CT-RATE publishes them: a CSV with one row a volume and one column a class."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def read_labels(labels_csv: str | Path, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a label table in the order of its rows.

    Args:
        labels_csv: CSV with a column ``VolumeName`` (with or without ``.nii.gz``) and one column a class.
        class_names: columns to read, in this order; further columns are left alone.

    Returns:
        Volume name without suffix to its labels: float32 ``(C,)`` of 0 and 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a column is missing, a volume has two rows, or a label is neither 0 nor 1.
    """
    path = Path(labels_csv)
    if not path.is_file():
        raise FileNotFoundError(f"labels_csv must be a file, got '{path}', which does not exist.")
    labels: dict[str, np.ndarray] = {}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [name for name in ("VolumeName", *class_names) if name not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(
                f"labels_csv must have the column '{missing[0]}', got {rows.fieldnames} in '{path}'."
            )
        for row in rows:
            volume = volume_name(row["VolumeName"])
            if volume in labels:
                raise ValueError(
                    f"labels_csv must have one row a volume, got two for volume '{volume}' in '{path}'."
                )
            labels[volume] = np.array([_binary(row, name, path) for name in class_names], dtype=np.float32)
    return labels


def volume_name(name: str) -> str:
    """Return the name of a volume without the suffix of its file.

    Args:
        name: as labels CSVs and folders write it.

    Example:
        >>> volume_name("train_1_a_1.nii.gz"), volume_name("train_1_a_1")
        ('train_1_a_1', 'train_1_a_1')
    """
    return name.strip().removesuffix(".nii.gz")


def _binary(row: dict[str, str], name: str, path: Path) -> float:
    value = (row[name] or "").strip()
    if value not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(
            f"label must be 0 or 1, got {value!r} of '{name}' for volume '{row['VolumeName']}' in '{path}'."
        )
    return float(value)
