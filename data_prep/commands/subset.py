"""``subset``: fewer patients with the label prevalence of all."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.cohort.cohort import load_labels, read_labels
from data_prep.subset import Subset, choose_subset, write_skip_list, write_subset


def subset(
    labels: Annotated[Path, typer.Option(help="Label table of CT-RATE: train_predicted_labels.csv.")],
    out: Annotated[Path, typer.Option(help="Label table of the subset to write.")],
    patients: Annotated[int, typer.Option(help="Patients to choose, with all their volumes.", min=1)] = 5000,
    seed: Annotated[int, typer.Option(help="Of the choice.", min=0)] = 42,
    skip_list: Annotated[
        Path | None, typer.Option(help="Also write all other volumes: --skip_list of the encoder bundles.")
    ] = None,
) -> None:
    """Choose patients so that every label is as frequent as among all patients (Table VI)."""
    names = [label.name for label in load_labels("ct_rate")]
    table = read_labels(labels, names)
    chosen = choose_subset(table, patients, seed)
    write_subset(out, chosen, table, names)
    if skip_list is not None:
        write_skip_list(skip_list, chosen, table)
    _show(chosen, names, len(table))


def _show(chosen: Subset, names: list[str], num_volumes: int) -> None:
    table = Table(
        "share of volumes",
        title=f"{len(chosen.volumes):,} of {num_volumes:,} volumes, {chosen.num_patients:,} patients",
    )
    for column in ("all", "subset", "difference", "of a random draw"):
        table.add_column(column, justify="right")
    off = 100 * (chosen.prevalence - chosen.prevalence_of_all)
    off_random = 100 * (chosen.prevalence_of_random - chosen.prevalence_of_all)
    for c, name in enumerate(names):
        table.add_row(
            name,
            f"{100 * chosen.prevalence_of_all[c]:.2f} %",
            f"{100 * chosen.prevalence[c]:.2f} %",
            f"{off[c]:+.4f}",
            f"{off_random[c]:+.4f}",
        )
    table.add_section()
    table.add_row("largest difference", "", "", f"{abs(off).max():.4f}", f"{abs(off_random).max():.4f}")
    Console().print(table)
