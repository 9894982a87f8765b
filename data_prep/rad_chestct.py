"""RAD-ChestCT: its label tables as the 16 classes of the probes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.cohort.cohort import load_labels, table_rows

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


def read_labels(tables: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Read the 16 classes that RAD-ChestCT shares with CT-RATE.

    A class is positive if any of its abnormalities is, at any location.

    Args:
        tables: the three ``img{train,valid,test}_Abnormality_and_Location_Labels.csv``, with the columns
            ``NoteAcc_DEID`` and ``abnormality*location``.

    Returns:
        Volume to class name to 0 or 1, classes in the order of the label list.

    Raises:
        FileNotFoundError: if a table is not there.
        ValueError: if a file is no CSV in UTF-8, an abnormality has no column, a volume comes twice, or a
            label is neither 0 nor 1.
    """
    labels: dict[str, dict[str, int]] = {}
    for table in tables:
        columns: dict[str, list[str]] = {}
        for row in table_rows(table, "labels", ("NoteAcc_DEID",)):
            columns = columns or _columns(list(row), table)
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
        if missing:
            raise ValueError(f"'{table}' must have columns of {prefixes}, got none of {sorted(missing)}.")
        columns[label.name] = [
            column for column in header if column.split("*")[0] in prefixes and "*" in column
        ]
    return columns


def _binary(value: str, column: str, volume: str) -> int:
    text = value.strip()
    if text not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(f"label must be 0 or 1, got {text!r} of '{column}' for volume '{volume}'.")
    return int(float(text))
