"""Tables as CSV files that appear only when they are complete."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.run.process import atomic_file


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    r"""Write a CSV file with a header.

    Args:
        path: file to write or replace; its folder must exist.
        columns: names of the columns.
        rows: cells in the order of the columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_table(Path(folder, "a.csv"), ("volume", "split"), [("train_1_a_1", "train")])
        ...     Path(folder, "a.csv").read_text()
        'volume,split\ntrain_1_a_1,train\n'
    """
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
