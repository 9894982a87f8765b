"""``turned``: volumes turned on purpose, to measure what orientation costs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from common.data.npz_ct import SPACING_MM
from common.data.rejection import RejectedError
from data_prep.commands.console import console, progress_bars
from data_prep.turned import find_volumes, write_turned


def turned(
    root: Annotated[Path, typer.Option(help="Folder of NIfTI in HU, or of RAD-ChestCT's npz.")],
    turn: Annotated[
        Literal["right", "transposed", "flipped", "sagittal"],
        typer.Option(help="How slices are to be shown."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of NIfTI to write; files that are there stay.")],
    prefix: Annotated[
        str, typer.Option(help="How names of volumes start, such as tst; all by default.")
    ] = "",
    npz_spacing_mm: Annotated[float, typer.Option(help="Edge of an npz file's voxels.")] = SPACING_MM,
) -> None:
    """Write volumes whose headers claim that they are the right way when they are not (Table IV)."""
    todo = {
        volume: path
        for volume, path in find_volumes(root, prefix).items()
        if not (out / f"{volume}.nii.gz").exists()
    }
    rejected = []
    with progress_bars() as progress:
        progress("Turning volumes", 0, len(todo))
        for done, (volume, path) in enumerate(todo.items(), start=1):
            try:
                write_turned(path, turn, out / f"{volume}.nii.gz", npz_spacing_mm)
            except RejectedError as error:
                rejected.append(f"{volume}: {error}")
            progress("Turning volumes", done, len(todo))
    for line in rejected:
        console.print(f"[red]Rejected:[/red] {escape(line)}", soft_wrap=True)
    console.print(f"{len(todo) - len(rejected)} volumes, {turn}, in {escape(str(out))}", soft_wrap=True)
    if rejected:
        raise typer.Exit(1)
