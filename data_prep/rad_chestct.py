"""RAD-ChestCT: its npz volumes as canonical slices, and its label tables as the 16 classes of the probes."""

import csv
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from common.labels import load_labels
from data_prep.nifti_file import canonical_hu
from data_prep.rejection import RejectedError

SPACING_MM = 0.8
"""All volumes were resampled to cubes of this size. Source: the dataset's description."""

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "Calcification": ("calcification",),
    "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",),
    "Hiatal hernia": ("hernia",),
    "Emphysema": ("emphysema",),
    "Atelectasis": ("atelectasis",),
    "Lung nodule": ("nodule", "nodulegr1cm"),
    "Lung opacity": ("opacity",),
    "Pulmonary fibrotic sequela": ("fibrosis",),
    "Pleural effusion": ("pleural_effusion",),
    "Peribronchial thickening": ("bronchial_wall_thickening",),
    "Consolidation": ("consolidation",),
    "Bronchiectasis": ("bronchiectasis",),
    "Interlobular septal thickening": ("septal_thickening",),
    "Lymphadenopathy": ("lymphadenopathy",),
    "Medical material": (
        *("catheter_or_port", "chest_tube", "clip", "gi_tube"),
        *("hardware", "pacemaker_or_defib", "stent", "tracheal_tube"),
    ),
}
"""Abnormalities that make up a class. Source: the map of DALE-CT's authors; others count hardware only."""


def rad_chestct_affine(spacing_mm: float = SPACING_MM) -> np.ndarray:
    """Return the affine of a volume: stored head to feet, anterior to posterior, right to left.

    Args:
        spacing_mm: edge of a voxel.

    Returns:
        ``(4, 4)`` voxel to RAS+ world in mm.

    Example:
        >>> import nibabel
        >>> nibabel.orientations.aff2axcodes(rad_chestct_affine())
        ('I', 'P', 'L')
    """
    affine = np.eye(4)
    affine[:3, :3] = -spacing_mm * np.eye(3)[::-1]
    return affine


def read_ct(path: Path, spacing_mm: float = SPACING_MM) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Read a volume as canonical slices, feet to head.

    Args:
        path: ``trn*.npz``, ``val*.npz`` or ``tst*.npz``, HU under the key ``ct``.
        spacing_mm: edge of a voxel.

    Returns:
        int16 HU ``(Z, H, W)`` and the spacing in mm as (x, y, z).

    Raises:
        RejectedError: if the file is damaged, a web page in place of a volume, or its array no CT.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = arrays["ct"]
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise RejectedError(
            "unreadable", f"'{path.name}' must be an npz file with an array 'ct', got {error}"
        ) from error
    if stored.dtype.kind not in "iuf":
        raise RejectedError("unreadable", f"voxels of '{path.name}' must be numbers, got {stored.dtype}")
    hu, voxel_mm, _ = canonical_hu(stored, rad_chestct_affine(spacing_mm), slope=1, intercept=0)
    return hu, voxel_mm


def read_labels(tables: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Read the 16 classes that RAD-ChestCT shares with CT-RATE.

    A class is positive if any of its abnormalities is, at any location.

    Args:
        tables: the three ``img{train,valid,test}_Abnormality_and_Location_Labels.csv``, with the columns
            ``NoteAcc_DEID`` and ``abnormality*location``.

    Returns:
        Volume to class name to 0 or 1, classes in the order of the label list.

    Raises:
        ValueError: if an abnormality has no column, a volume comes twice, or a label is neither 0 nor 1.
    """
    labels: dict[str, dict[str, int]] = {}
    for table in tables:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = _columns(reader.fieldnames or [], table)
            for row in reader:
                volume = row["NoteAcc_DEID"].strip()
                if volume in labels:
                    raise ValueError(f"a volume must have one row, got two for '{volume}', one in '{table}'.")
                labels[volume] = {
                    name: max(_binary(row[column], column, volume) for column in own)
                    for name, own in columns.items()
                }
    return labels


def _columns(header: Sequence[str], table: Path) -> dict[str, list[str]]:
    columns = {}
    for label in load_labels("rad_chestct"):
        prefixes = PREFIXES[label.name]
        missing = set(prefixes) - {column.split("*")[0] for column in header if "*" in column}
        if missing or "NoteAcc_DEID" not in header:
            raise ValueError(
                f"'{table}' must have NoteAcc_DEID and columns of {prefixes}, got none of {sorted(missing)}."
            )
        columns[label.name] = [
            column for column in header if column.split("*")[0] in prefixes and "*" in column
        ]
    return columns


def _binary(value: str | None, column: str, volume: str) -> int:
    text = (value or "").strip()
    if text not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(f"label must be 0 or 1, got {text!r} of '{column}' for volume '{volume}'.")
    return int(float(text))
