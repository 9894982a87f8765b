"""``splits``: write which side of a split every volume is on, or prove a list that was written."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.cohort.cohort import listed_volumes, patient_of, read_labels, split_by_patient, split_three_ways
from data_prep.commands.console import console
from data_prep.splits import differing_patients, read_patients, read_split, split_errors, write_split


def splits(
    labels: Annotated[
        Path | None, typer.Option(help="Label table of the cohort, such as train_predicted_labels.csv.")
    ] = None,
    volumes: Annotated[
        Path | None, typer.Option(help="Instead of a label table: text file, one volume or path a line.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Split list to write: volume, patient, split.")] = None,
    check: Annotated[Path | None, typer.Option(help="Split list to prove instead of writing one.")] = None,
    expect: Annotated[
        Path | None, typer.Option(help="List of the patients that the validation side must have, no others.")
    ] = None,
    num_val_patients: Annotated[int, typer.Option(help="Patients to draw for validation.", min=1)] = 1000,
    dense_probes: Annotated[
        bool, typer.Option("--dense-probes", help="70/10/20 % of the patients: train, validation, test.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draw.", min=0)] = 42,
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
    _show(path, rows)
    for error in errors:
        console.print(f"[red]Wrong:[/red] {escape(error)}.", soft_wrap=True)
    if errors:
        raise typer.Exit(1)
    console.print(_proven(cohort is not None, expect), soft_wrap=True)


def _cohort(labels: Path | None, volumes: Path | None) -> list[str] | None:
    if labels is not None and volumes is not None:
        raise ValueError("at most one of --labels and --volumes must be given, got both.")
    if labels is not None:
        return list(read_labels(labels, []))
    return None if volumes is None else sorted(listed_volumes(volumes))


def _show(path: Path, rows: list[tuple[str, str]]) -> None:
    table = Table("split", title=f"{escape(str(path))}")
    for name in ("patients", "volumes"):
        table.add_column(name, justify="right")
    for side in dict.fromkeys(side for _, side in rows):
        own = [volume for volume, its_side in rows if its_side == side]
        table.add_row(escape(side), f"{len({patient_of(volume) for volume in own}):,}", f"{len(own):,}")
    Console().print(table)


def _proven(has_cohort: bool, expect: Path | None) -> str:
    claims = ["no patient is on two sides", "no volume is there twice"]
    claims += ["none of the cohort is missing or too many"] if has_cohort else []
    claims += [f"the validation patients are those of {escape(str(expect))}"] if expect else []
    return f"Proven: {', '.join(claims)}."
