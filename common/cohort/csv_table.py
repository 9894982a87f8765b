"""Tables as CSV files with a header, read with one-line errors."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path


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
