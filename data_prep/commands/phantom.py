"""``phantom``: a synthetic cohort in the layouts of the real data sets. ``lesion-areas``: its truth."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from data_prep.commands.console import console, progress_bars
from data_prep.phantom.cohort import Settings, write_cohort
from data_prep.phantom.reports import write_reports


def phantom(
    volumes: Annotated[
        int, typer.Option(help="Number of volumes; a larger number later continues the cohort.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the cohort: new, or one with the same settings.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other patients.")] = 0,
    site: Annotated[
        str, typer.Option(help="a, or b: another scanner, also written as RAD-ChestCT npz.")
    ] = "a",
    form: Annotated[str, typer.Option(help="CT-RATE's v2 (HU), v1 (raw, blank header), or both.")] = "v2",
    matrix: Annotated[int, typer.Option(help="Rows and columns of a slice.")] = 512,
    spacing_mm: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--spacing-mm", "--spacing", help="Range of the slice distance; the site's own by default."
        ),
    ] = None,
    valid_share: Annotated[float, typer.Option(help="Share of the patients in the validation split.")] = 0.2,
    rex_share: Annotated[float, typer.Option(help="Share of the scans with ReXGroundingCT masks.")] = 0.3,
    npz_spacing_mm: Annotated[
        float, typer.Option(help="Voxel edge of site b's npz; larger is faster.")
    ] = 0.8,
    kernel: Annotated[
        str | None,
        typer.Option(help="Kernel of all scans, such as PHANTOM_SOFT; each scan's own by default."),
    ] = None,
    dose: Annotated[float, typer.Option(help="Share of the dose: 0.25 doubles the noise.")] = 1.0,
    table: Annotated[bool, typer.Option(help="Whether the patients lie on a table.")] = True,
    processes: Annotated[int | None, typer.Option(help="Processes; the number of cores by default.")] = None,
    reports: Annotated[bool, typer.Option("--reports", help="Also word each volume's findings.")] = False,
) -> None:
    """Write a SYNTHETIC chest-CT cohort in CT-RATE's, ReXGroundingCT's and (site b) RAD-ChestCT's layout."""
    settings = Settings(
        *(seed, site, form, matrix, spacing_mm, valid_share, rex_share, npz_spacing_mm, kernel, dose, table)
    )
    with progress_bars() as progress:
        progress("Drawing synthetic volumes", 0, volumes)
        for done, _ in enumerate(write_cohort(out, volumes, settings, processes), start=1):
            progress("Drawing synthetic volumes", done, volumes)
    if reports:
        write_reports(out)
    console.print(f"{volumes} synthetic volumes in {escape(str(out))}", soft_wrap=True)


def lesion_areas(
    root: Annotated[Path, typer.Option(help="Cohort of the command phantom.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder of the embeddings to write.")],
    split: Annotated[Literal["train", "valid"] | None, typer.Option(help="Split; both by default.")] = None,
) -> None:
    """Write a SYNTHETIC cohort's true lesion areas as embeddings: a ceiling for every encoder."""
    from data_prep.phantom.truth import write_lesion_areas  # imports torch, which takes seconds

    number = write_lesion_areas(root, out, split)
    console.print(f"True lesion areas of {number} volumes in {escape(str(out))}", soft_wrap=True)
