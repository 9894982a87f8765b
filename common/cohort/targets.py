"""Targets of one's own in a table: 0 or 1, numbers, and times to an event."""

# N volumes

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.cohort.cohort import table_rows
from common.ct.files import unique_names

logger = logging.getLogger(__name__)
BINARY, NUMBER, SURVIVAL = "binary", "number", "survival"
IS_BINARY = {BINARY: (True,), NUMBER: (False,), SURVIVAL: (False, True)}
"""Which of a kind's columns hold 0 and 1."""


class Target(NamedTuple):
    """What is to be predicted.

    Args:
        name: its name, the column's unless it is of survival.
        kind: "binary", "number" or "survival".
        values: volume to its label or number; of survival to time and event, 1 where it happened and 0 where
            the patient was last seen without it.
    """

    name: str
    kind: str
    values: Mapping[str, tuple[float, ...]]


def read_targets(targets_csv: str | Path, targets: Mapping[str, str | Sequence[str]]) -> list[Target]:
    """Read targets from a table; a volume with an empty cell is left out of that target, which is logged.

    Args:
        targets_csv: CSV with a column ``VolumeName`` (name or path, with or without suffix) and the targets.
        targets: column to its kind, "binary" or "number"; or any name to the columns of time and event.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there is no target, a kind is unknown, a column is missing, a volume has two rows, a
            cell is no number, a label or event is neither 0 nor 1, a time is not positive, or nothing is
            filled in.
    """
    columns: dict[str, tuple[str, list[str]]] = {}
    for name, kind in targets.items():
        is_pair = not isinstance(kind, str) and len(kind) == 2
        if not is_pair and kind not in (BINARY, NUMBER):
            raise ValueError(
                f"targets must be '{BINARY}', '{NUMBER}' or [time column, event column], got {kind!r} for "
                f"'{name}'."
            )
        columns[name] = (SURVIVAL, list(kind)) if is_pair else (str(kind), [name])
    if not columns:
        raise ValueError("targets must name at least one column, such as {'age': 'number'}.")
    path = Path(targets_csv)
    wanted = [column for _, names in columns.values() for column in names]
    rows = list(table_rows(path, "targets_csv", ("VolumeName", *wanted)))
    places = [Path(row["VolumeName"].strip().replace("\\", "/")) for row in rows]
    names_of = unique_names(places)
    volumes = [names_of[place] for place in places]
    if len(set(volumes)) < len(volumes):
        twice = next(volume for volume in volumes if volumes.count(volume) > 1)
        raise ValueError(f"targets_csv has two rows for volume '{twice}' in '{path}'. Keep one of them.")
    found = []
    for name, (kind, cells) in columns.items():
        filled = {
            volume: tuple(
                _number(row, column, path, is_binary=binary, is_time=kind == SURVIVAL and not binary)
                for column, binary in zip(cells, IS_BINARY[kind], strict=True)
            )
            for volume, row in zip(volumes, rows, strict=True)
            if all(row[column].strip() for column in cells)
        }
        if not filled:
            raise ValueError(f"targets_csv has no value of {cells} in '{path}'.")
        if len(filled) < len(rows):
            logger.warning("'%s' is empty for %d of %d rows.", name, len(rows) - len(filled), len(rows))
        found.append(Target(name, kind, filled))
    return found


def _number(row: Mapping[str, str], column: str, path: Path, *, is_binary: bool, is_time: bool) -> float:
    """Read a cell, or say why it is none of its kind."""
    try:
        value = float(row[column])
    except ValueError:
        value = math.nan
    rule = "0 or 1" if is_binary else "a positive number" if is_time else "a number"
    if not math.isfinite(value) or (is_binary and value not in (0, 1)) or (is_time and value <= 0):
        raise ValueError(
            f"{column} must be {rule}, got {row[column]!r} for volume '{row['VolumeName']}' in '{path}'."
        )
    return value
