"""Split lists: which side of a split every volume is on, written once and checked afterwards."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from common.cohort.cohort import natural_order, patient_of, table_rows
from data_prep.tables import write_table

COLUMNS = ("volume", "patient", "split")


def write_split(path: Path, sides: Mapping[str, Sequence[str]]) -> None:
    """Write a split list (name of each side to its volumes): one row per volume, in natural order."""
    rows = [(volume, patient_of(volume), side) for side, volumes in sides.items() for volume in volumes]
    rows.sort(key=lambda row: natural_order(row[0]))
    write_table(path, COLUMNS, rows)


def read_split(path: Path) -> list[tuple[str, str]]:
    """Read a split list as it is, with any mistakes in it.

    Args:
        path: CSV with the columns ``volume`` and ``split``.

    Returns:
        Volume and side of each row.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a CSV in UTF-8, lacks a column or has no row.
    """
    rows = [(row["volume"], row["split"]) for row in table_rows(path, "split list", ("volume", "split"))]
    if not rows:
        raise ValueError(f"No rows in the split list '{path}'.")
    return rows


def read_patients(path: Path) -> set[str]:
    """Read a list of patients, such as those of ``data_prep/split_lists``.

    Args:
        path: CSV with the column ``patient``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a CSV in UTF-8, or lacks the column.
    """
    return {row["patient"] for row in table_rows(path, "list", ("patient",))}


def split_errors(rows: Sequence[tuple[str, str]], cohort: Collection[str] | None = None) -> list[str]:
    """List what is wrong with a split.

    Args:
        rows: volume and side of each row.
        cohort: volumes that the split must have, and no others; None if not known.

    Returns:
        One line per kind of error, with the first offenders; empty if each volume is there once, no patient
        is on two sides, and the volumes are those of the cohort.

    Raises:
        ValueError: if a volume's name does not tell its patient.

    Example:
        >>> split_errors([("train_1_a_1", "train"), ("train_1_b_1", "validation")])
        ["a patient must be on one side, got 1 on several: 'train_1'"]
    """
    sides_of: dict[str, set[str]] = {}
    for volume, side in rows:
        sides_of.setdefault(patient_of(volume), set()).add(side)
    times = Counter(volume for volume, _ in rows)
    listed = set(cohort) if cohort is not None else times.keys()
    found = {
        "a patient must be on one side, got {} on several": [p for p, s in sides_of.items() if len(s) > 1],
        "a volume must have one row, got {} with several": [v for v, count in times.items() if count > 1],
        "every volume of the cohort must be in the split, but {} are not": listed - times.keys(),
        "every volume of the split must be in the cohort, but {} are not": times.keys() - listed,
    }
    return [f"{rule.format(len(names))}: {_first(names)}" for rule, names in found.items() if names]


def differing_patients(rows: Sequence[tuple[str, str]], side: str, expected: Collection[str]) -> list[str]:
    """List how the patients of one side differ from a list.

    Args:
        rows: volume and side of each row.
        side: side whose patients to compare.
        expected: patients it must have.

    Returns:
        One line for missing patients and one for additional ones; empty if they agree.
    """
    got = {patient_of(volume) for volume, its_side in rows if its_side == side}
    found = {
        f"'{side}' must have the patients of the list, but {{}} are missing": set(expected) - got,
        f"'{side}' must have only the patients of the list, but has {{}} more": got - set(expected),
    }
    return [f"{rule.format(len(names))}: {_first(names)}" for rule, names in found.items() if names]


def _first(names: Collection[str], most: int = 3) -> str:
    ordered = sorted(names, key=natural_order)
    return ", ".join(f"'{name}'" for name in ordered[:most]) + (", ..." if len(ordered) > most else "")
