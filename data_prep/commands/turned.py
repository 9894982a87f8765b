"""``turned``: volumes turned on purpose, to measure what a wrong orientation costs."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from common.ct.npz import SPACING_MM
from common.ct.rejection import RejectedError
from common.run.process import atomic_file
from data_prep.commands.console import console, left_out, progress_bars
from data_prep.turned import find_volumes, write_turned


def turned(
    root: Annotated[Path, typer.Option(help="Folder of NIfTI in HU, or of RAD-ChestCT's npz.")],
    turn: Annotated[
        Literal["right", "transposed", "flipped", "sagittal"],
        typer.Option(help="How slices are to be shown."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of NIfTI to write; existing files stay.")],
    prefix: Annotated[str, typer.Option(help="Start of the volumes' names, such as tst. Default: all.")] = "",
    npz_spacing_mm: Annotated[float, typer.Option(help="Edge of an npz file's voxels.")] = SPACING_MM,
) -> None:
    """Write volumes whose headers wrongly claim the standard orientation (Table IV)."""
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
                rejected.append((volume, str(error)))
            progress("Turning volumes", done, len(todo))
    for volume, message in rejected:
        left_out(volume, message)
    console.print(f"{len(todo) - len(rejected)} volumes, {turn}, in {out}", soft_wrap=True, markup=False)
    if rejected:
        raise typer.Exit(1)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Record how the volumes of a folder are turned, or compare with the record."""
    path = out / "turned.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != settings:
            raise ValueError(f"'{out}' was made with {found}, now {settings}. Choose another --out.")
        return
    if out.is_dir() and any(out.glob("*.nii.gz")):
        raise ValueError(f"'{out}' has volumes but no turned.json that says how they were turned.")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(settings, file)
