"""``turned``: volumes turned on purpose, to measure what orientation costs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from common.ct.geometry import RejectedError
from common.ct.npz import SPACING_MM
from common.run.process import atomic_file
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
    volumes = find_volumes(root, prefix)
    _claim(out, {"turn": turn, "root": str(root.resolve()), "npz_spacing_mm": npz_spacing_mm})
    todo = {volume: path for volume, path in volumes.items() if not (out / f"{volume}.nii.gz").exists()}
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


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write down how the volumes of a folder are turned, or compare with what is there."""
    path = out / "turned.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(
                f"out must be empty or hold volumes of these settings, {settings}, got {found} in '{out}'. "
                "Choose another --out."
            )
        return
    if out.is_dir() and any(out.glob("*.nii.gz")):
        raise ValueError(f"out must hold a turned.json beside its volumes, got none in '{out}'.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(settings, file)
