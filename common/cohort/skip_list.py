"""Lists of volumes to use or to leave out: text files and tables that users and datasets write."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from common.ct.names import volume_name

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
