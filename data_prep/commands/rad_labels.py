"""``rad-labels``: RAD-ChestCT's labels as one table of the form that the evaluation bundles read."""

import csv
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from common.labels import load_labels
from common.run.process import atomic_file
from data_prep.commands.console import console
from data_prep.rad_chestct_folder import read_all_labels


def rad_labels(
    root: Annotated[Path, typer.Option(help="RAD-ChestCT as downloaded, with its three label tables.")],
    out: Annotated[Path, typer.Option(help="Label table to write: VolumeName and 16 classes.")],
) -> None:
    """Write the labels of RAD-ChestCT as one table: each class is positive at any location (Table IV)."""
    names = [label.name for label in load_labels("rad_chestct")]
    labels = read_all_labels(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["VolumeName", *names])
        table.writerows([volume, *(own[name] for name in names)] for volume, own in labels.items())
    console.print(f"{len(labels):,} volumes in {escape(str(out))}", soft_wrap=True)
