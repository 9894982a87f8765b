"""``splits``, ``subset`` and ``rad-labels``: lists of volumes and their labels."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.cohort.cohort import (
    listed_volumes,
    load_labels,
    patient_of,
    read_labels,
    split_by_patient,
    split_three_ways,
)
from data_prep.commands.console import console
from data_prep.sources.rad_chestct import read_all_labels
from data_prep.splits import differing_patients, read_patients, read_split, split_errors, write_split
from data_prep.subset import Subset, choose_subset, write_skip_list, write_subset
from data_prep.tables import write_table


def splits(
    labels: Annotated[
        Path | None, typer.Option(help="Label table of the cohort, such as train_predicted_labels.csv.")
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(help="Instead of a label table: text file, one volume or path per line.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Split list to write: volume, patient, split.")] = None,
    check: Annotated[Path | None, typer.Option(help="Split list to check instead of writing one.")] = None,
    expect: Annotated[
        Path | None, typer.Option(help="List of patients that the validation side must have, and no others.")
    ] = None,
    num_val_patients: Annotated[int, typer.Option(help="Patients to draw for validation.", min=1)] = 1000,
    dense_probes: Annotated[
        bool, typer.Option("--dense-probes", help="70/10/20 % of the patients: train, validation, test.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the draw.", min=0)] = 42,
) -> None:
    """Split a cohort by patient, the same way whatever the order of its table, and prove that it is so."""
    path = out if check is None else check
    if path is None or (out is not None and check is not None):
        raise ValueError("one of --out and --check must be given, got both or none.")
    cohort = _cohort(labels, volumes)
    if check is None:
        if cohort is None:
            raise ValueError("--labels or --volumes must say what to split, got none of them.")
        sides = (
            split_three_ways(cohort, seed)
            if dense_probes
            else split_by_patient(cohort, num_val_patients, seed)
        )
        write_split(path, sides)
    rows = read_split(path)
    errors = split_errors(rows, cohort)
    if expect is not None:
        errors += differing_patients(rows, "validation", read_patients(expect))
    _show_split(path, rows)
    for error in errors:
        console.print(f"[red]Wrong:[/red] {escape(error)}.", soft_wrap=True)
    if errors:
        raise typer.Exit(1)
    claims = ["no patient is on two sides", "no volume is listed twice"]
    claims += ["no volume of the cohort is missing, and there are no others"] if cohort is not None else []
    claims += [f"the validation patients are those of {expect}"] if expect else []
    console.print(f"Proven: {', '.join(claims)}.", soft_wrap=True, markup=False)


def _cohort(labels: Path | None, volumes: Path | None) -> list[str] | None:
    if labels is not None and volumes is not None:
        raise ValueError("at most one of --labels and --volumes must be given, got both.")
    if labels is not None:
        return list(read_labels(labels, []))
    return None if volumes is None else sorted(listed_volumes(volumes))


def _show_split(path: Path, rows: list[tuple[str, str]]) -> None:
    table = Table("split", title=escape(str(path)))
    for name in ("patients", "volumes"):
        table.add_column(name, justify="right")
    for side in dict.fromkeys(side for _, side in rows):
        on_side = [volume for volume, its_side in rows if its_side == side]
        table.add_row(
            escape(side), f"{len({patient_of(volume) for volume in on_side}):,}", f"{len(on_side):,}"
        )
    Console().print(table)


def subset(
    labels: Annotated[Path, typer.Option(help="Label table of CT-RATE: train_predicted_labels.csv.")],
    out: Annotated[Path, typer.Option(help="Label table of the subset to write.")],
    patients: Annotated[int, typer.Option(help="Patients to choose, with all their volumes.", min=1)] = 5000,
    seed: Annotated[int, typer.Option(help="Seed of the choice.", min=0)] = 42,
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
    _show_subset(chosen, names, len(table))


def _show_subset(chosen: Subset, names: list[str], num_volumes: int) -> None:
    table = Table(
        "share of volumes",
        title=f"{len(chosen.volumes):,} of {num_volumes:,} volumes, {chosen.num_patients:,} patients",
    )
    for column in ("all", "subset", "difference", "of a random draw"):
        table.add_column(column, justify="right")
    off = 100 * (chosen.prevalence - chosen.prevalence_of_all)
    off_random = 100 * (chosen.prevalence_of_random - chosen.prevalence_of_all)
    for c, name in enumerate(names):
        shares = (
            f"{100 * prevalence[c]:.2f} %" for prevalence in (chosen.prevalence_of_all, chosen.prevalence)
        )
        table.add_row(name, *shares, f"{off[c]:+.4f}", f"{off_random[c]:+.4f}")
    table.add_section()
    table.add_row("largest difference", "", "", f"{abs(off).max():.4f}", f"{abs(off_random).max():.4f}")
    Console().print(table)


def rad_labels(
    root: Annotated[Path, typer.Option(help="RAD-ChestCT as downloaded, with its three label tables.")],
    out: Annotated[Path, typer.Option(help="Label table to write: VolumeName and 16 classes.")],
) -> None:
    """Write the labels of RAD-ChestCT as one table: each class is positive at any location (Table IV)."""
    names = [label.name for label in load_labels("rad_chestct")]
    labels = read_all_labels(root)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [[volume, *(values[name] for name in names)] for volume, values in labels.items()]
    write_table(out, ["VolumeName", *names], rows)
    console.print(f"{len(labels):,} volumes in {out}", soft_wrap=True, markup=False)
