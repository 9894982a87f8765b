"""``hu-stats`` and ``pos-weights``: statistics of HU and masks, measured on shards."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.run.process import atomic_file
from common.shards.shards import ShardSet
from data_prep.cluster import dask_client
from data_prep.commands.console import console, left_out, progress_bars
from data_prep.commands.options import Scheduler, Shards, Workers
from data_prep.hu_stats import (
    HIGHEST_HU,
    LOWEST_HU,
    Counts,
    HUStatistics,
    VolumeTask,
    count_volumes,
    hu_statistics,
    sample_volumes,
)
from data_prep.pos_weights import (
    ClassWeight,
    MaskCounts,
    class_weights,
    count_shards,
    write_weights,
)


def hu_stats(
    shards: Shards,
    split: Annotated[str, typer.Option(help="Split to draw volumes from.")] = "train",
    volumes: Annotated[int, typer.Option(help="Volumes to draw; all where there are fewer.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the draw.", min=0)] = 42,
    slice_stride: Annotated[int, typer.Option(help="Step between the slices to read.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON to write, histogram included.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Histogram to draw, as PNG.")] = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Measure the HU of the body in a random sample of volumes, beside what the encoders use."""
    tasks = sample_volumes(ShardSet(shards.absolute(), split), volumes, seed, slice_stride)
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        counts, failed = count_volumes(client, tasks, progress)
    statistics = hu_statistics(counts)
    _show(statistics, counts, len(tasks) - len(failed))
    if out is not None:
        settings = {"split": split, "seed": seed, "slice_stride": slice_stride}
        _write_json(out, settings, statistics, counts, tasks, failed)
    if picture is not None:
        _draw(picture, statistics, counts)
    for volume, message in sorted(failed.items()):
        console.print(f"[red]Left out:[/red] '{volume}': {escape(message)}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _show(statistics: HUStatistics, counts: Counts, num_volumes: int) -> None:
    from common.transforms.hounsfield import HU_WINDOWS  # here, for it imports torch

    table = Table("HU of the foreground", title=f"{num_volumes:,} volumes, {counts.num_slices:,} slices")
    for column in ("measured", *(f"window {name}" for name in HU_WINDOWS)):
        table.add_column(column, justify="right")
    windows = list(HU_WINDOWS.values())
    stated = {0.5: [window.min_hu for window in windows], 99.5: [window.max_hu for window in windows]}
    rows = [
        *(
            (f"{percent:g} % percentile", hu, stated.get(percent, []))
            for percent, hu in statistics.percentiles_hu.items()
        ),
        ("mean", statistics.mean_hu, [window.mean_hu for window in windows]),
        ("standard deviation", statistics.std_hu, [window.std_hu for window in windows]),
    ]
    for name, measured, others in rows:
        table.add_row(name, f"{measured:,.2f}", *(f"{hu:,.2f}" for hu in others))
    table.add_section()
    table.add_row("voxels", f"{statistics.num_foreground:,}")
    table.add_row("share of all voxels", f"{statistics.foreground_share:.2%}")
    table.add_row(f"at {LOWEST_HU} HU, the lowest stored", f"{statistics.lowest_share:.4%}")
    table.add_row(f"at {HIGHEST_HU} HU, the highest stored", f"{statistics.highest_share:.4%}")
    Console().print(table)


def _write_json(
    path: Path,
    settings: dict[str, object],
    statistics: HUStatistics,
    counts: Counts,
    tasks: list[VolumeTask],
    failed: dict[str, str],
) -> None:
    content = {
        **settings,
        "num_volumes": len(tasks) - len(failed),
        "num_slices": counts.num_slices,
        "num_voxels": counts.num_voxels,
        **statistics._asdict(),
        "left_out": dict(sorted(failed.items())),
        "volumes": [task.volume for task in tasks if task.volume not in failed],
        "histogram_first_hu": LOWEST_HU,
        "histogram": counts.histogram.tolist(),
    }
    with atomic_file(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.write("\n")


def _draw(path: Path, statistics: HUStatistics, counts: Counts) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    hu = np.arange(LOWEST_HU, HIGHEST_HU + 1)
    axes.fill_between(hu, counts.histogram / statistics.num_foreground, step="mid", alpha=0.6)
    axes.set_yscale("log")
    low, high = statistics.percentiles_hu[0.5], statistics.percentiles_hu[99.5]
    for place, style, text in (
        (low, "--", f"0.5 % below {low:,.0f} HU"),
        (statistics.mean_hu, "-", f"mean {statistics.mean_hu:,.1f} HU"),
        (high, ":", f"0.5 % above {high:,.0f} HU"),
    ):
        axes.axvline(place, color="black", linestyle=style, linewidth=1, label=text)
    axes.legend()
    axes.set(
        xlabel="HU",
        ylabel="share of the foreground's voxels per HU",
        xlim=(LOWEST_HU, HIGHEST_HU),
        title=f"Foreground, {counts.num_slices:,} slices",
    )
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def pos_weights(
    shards: Shards,
    out: Annotated[Path, typer.Option(help="Folder for totalsegmentator.csv and rexgroundingct.csv.")],
    split: Annotated[str, typer.Option(help="Split whose masks to count.")] = "train",
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Count how frequent organs and findings are, and weight their positives by it."""
    paths = list(dict.fromkeys(entry.shard for entry in ShardSet(shards.absolute(), split).volumes))
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        totals, failed = count_shards(client, paths, progress)
    out.mkdir(parents=True, exist_ok=True)
    for name, counts in totals.items():
        if counts.num_volumes == 0:
            console.print(f"No volume of split '{escape(split)}' has masks of {name}: no weights for it.")
            continue
        weights = class_weights(name, counts)
        _show_weights(name, weights, counts)
        write_weights(out / f"{name}.csv", weights)
    for shard, message in sorted(failed.items()):
        left_out(shard, message)
    if failed:
        raise typer.Exit(1)


def _show_weights(name: str, weights: list[ClassWeight], counts: MaskCounts) -> None:
    table = Table("class", title=f"{name}: {counts.num_volumes:,} volumes, {counts.num_without:,} without")
    for column in ("share of cells", "by frequency", "weight", "in use"):
        table.add_column(column, justify="right")
    for weight in weights:
        table.add_row(
            f"{weight.label.code} {weight.label.name}".strip(),
            f"{weight.frequency:.4%}",
            f"{weight.weight_by_frequency:,.2f}",
            f"{weight.pos_weight:,.2f}",
            f"{weight.label.pos_weight:,.2f}",
        )
    Console().print(table)
    unseen = [weight.label.name for weight in weights if weight.cells == 0]
    if unseen:
        console.print(f"Never seen: {', '.join(unseen)}.", soft_wrap=True)
