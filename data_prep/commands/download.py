"""``download``: a dataset from the Hugging Face hub onto the disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from data_prep.commands.console import console, show_rows
from data_prep.hub import download as hub
from data_prep.hub.access import open_repository
from data_prep.hub.files import (
    REPOSITORIES,
    RemoteFile,
    label_map_places,
    list_files,
    parse_patients,
    select,
    stem_of,
    table_places,
    volume_places,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def download(
    dataset: Annotated[Literal["ct-rate", "rexgroundingct", "rad-chestct"], typer.Argument(help="Dataset.")],
    out: Annotated[Path, typer.Option(help="Folder to fill: --root of the commands that convert.")],
    split: Annotated[
        Literal["train", "valid", "test"] | None, typer.Option(help="Split of the volumes. Default: all.")
    ] = None,
    patients: Annotated[
        str | None,
        typer.Option(help="Patients, by the first number in volumes' names, such as 1:100,205."),
    ] = None,
    volumes: Annotated[
        list[str] | None,
        typer.Option(help="Names of volumes, such as train_1_*; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first N of these volumes only.", min=1)] = None,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Metadata, labels and lists without volumes.")
    ] = False,
    form: Annotated[
        Literal["v2", "v1"], typer.Option(help="CT-RATE's volumes in HU (v2), or raw and outdated (v1).")
    ] = "v2",
    label_maps: Annotated[
        bool, typer.Option("--label-maps", help="CT-RATE's TotalSegmentator label maps of the volumes too.")
    ] = False,
    repo_id: Annotated[
        str | None, typer.Option(help="Another copy: owner/name on the hub. RAD-ChestCT needs one.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the dataset.")] = "main",
    jobs: Annotated[int, typer.Option(help="Files at a time.", min=1, max=64)] = 8,
) -> None:
    """Download a dataset, or resume it: complete files are verified and kept.

    Accept the dataset's terms on its page first, then run: hf auth login (or set HF_TOKEN).
    """
    if dataset != "ct-rate" and (label_maps or form != "v2"):
        raise ValueError(f"--label-maps and --form are for ct-rate only, got {dataset}.")
    repository = repo_id or REPOSITORIES.get(dataset)
    if repository is None:
        raise ValueError(
            "--repo-id must name a copy of RAD-ChestCT on the hub that you may read. Its authors share it on "
            "https://zenodo.org/records/6406114; the command rad-chestct reads that download as it is."
        )
    spans = [] if patients is None else parse_patients(patients)
    wanted_places = [] if tables_only else volume_places(dataset, split, form, spans)
    api, commit = open_repository(repository, revision)
    with console.status("Listing the dataset's files"):
        tables = list_files(api, repository, commit, table_places(dataset))
        chosen = select(list_files(api, repository, commit, wanted_places), spans, volumes or [], limit)
        if label_maps and not tables_only:
            names = {stem_of(file) for file in chosen}
            maps = list_files(api, repository, commit, label_map_places(split, spans))
            chosen += [file for file in maps if stem_of(file) in names]
    if not tables_only and not chosen:
        raise FileNotFoundError(f"'{repository}' has none of these volumes. See its page.")
    _fill(api, repository, commit, tables + chosen, out, jobs)


def _fill(api: "HfApi", repository: str, commit: str, files: list[RemoteFile], out: Path, jobs: int) -> None:
    """Fetch what is missing and show the outcome; exit with status 1 if a file failed."""
    out.mkdir(parents=True, exist_ok=True)
    plan = hub.plan_download(files, out)
    free = hub.check_room(plan, out)
    console.print(
        f"{repository} at {commit[:8]}: {len(plan.todo):,} files to fetch, which take "
        f"{decimal(plan.num_bytes)} of {decimal(free)} free; {plan.num_kept:,} are there.",
        soft_wrap=True,
    )
    with _bars(len(plan.todo), sum(file.num_bytes for file in plan.todo)) as show:
        failed = plan.unsafe + hub.download(api, repository, commit, plan.todo, out, jobs=jobs, progress=show)
    hub.write_failed(out, failed)
    rows = (
        ("commit", commit),
        ("files fetched", f"{len(plan.todo) + len(plan.unsafe) - len(failed):,}"),
        ("there before", f"{plan.num_kept:,}"),
        ("failed", f"{len(failed):,}"),
    )
    show_rows(f"Download in {out}", rows)
    if failed:
        for item in failed[:10]:
            console.print(escape(f"{item.path}: {item.reason}"), soft_wrap=True)
        console.print(
            f"All failures are in {escape(str(out / hub.FAILED))}. Run the same command again.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


@contextmanager
def _bars(num_files: int, num_bytes: int) -> Iterator[hub.ShowDownload]:
    """Show files and bytes, with the rate and the time left."""
    columns = (
        TextColumn("{task.fields[files]} files"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=120) as bars:
        task = bars.add_task("", total=num_bytes, files=f"0/{num_files:,}")

        def show(files_done: int, bytes_done: int) -> None:
            bars.update(task, completed=bytes_done, files=f"{files_done:,}/{num_files:,}")

        yield show
