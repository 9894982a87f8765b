"""The scaling curve: how well probes read an encoder after ever more views, beside floors.

``python -m study.scaling`` trains encoders of the study's smallest size for 64, 250, 1,000, ... steps,
several times each, reads all by Table III's standardized probes, and draws AUROC and AUPRC against the views
they saw. It shares the cohort and the floors with the study, and resumes as that does: more steps or more
seeds add to what is there.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.reports.results import ResultRow, read_rows
from common.run.process import write_figure
from study.plan import FLOORS, SIZES, Size
from study.run import amp_dtype, folder_of, run_stages
from study.stages import REPOSITORY, Stage, all_stages, bundle, embed, train

ENCODERS = ("dale_ct_0", "dale_ct_2s")
STEPS = (64, 250, 1000, 4000)
PROTOCOL = "mil_probe_standardized"
MEASURES = {"macro_auroc": "macro AUROC", "macro_auprc": "macro AUPRC"}
COLOURS = {
    "dale_ct_0": "#0072b2",
    "dale_ct_2s": "#d55e00",
    "random_weights": "#777777",
    "intensity_histogram": "#009e73",
    "pixels": "#cc79a7",
}


def point_name(encoder: str, steps: int, seed: int) -> str:
    """Return how the encoder of one training is called, in folders and rows."""
    return f"{encoder}_{steps}_steps_seed_{seed}"


def scaling_stages(size: Size, out: Path, amp_dtype: str, *, max_steps: int, seeds: int) -> list[Stage]:
    """Return the stages of the curve: the study's cohort and floors, then a stage for each training.

    Args:
        size: of the study.
        out: folder of everything that is made.
        amp_dtype: precision of training and embedding, ``bfloat16`` or ``float32``.
        max_steps: longest training.
        seeds: trainings of each length.
    """
    shared = {"site a", "shards", *(f"table III {name}" for name in FLOORS)}
    stages = [stage for stage in all_stages(size, out, amp_dtype) if stage.name in shared]
    labels = out / "cohort" / "dataset" / "multi_abnormality_labels"
    for steps in (steps for steps in STEPS if steps <= max_steps):
        for seed in range(1, seeds + 1):
            for encoder in ENCODERS:
                name = point_name(encoder, steps, seed)
                schedule = {"max_steps": steps, "warmup_steps": min(100, steps // 4), "seed": seed}
                commands = [train(name, encoder, [], schedule, size, out, amp_dtype)]
                embeddings = out / "embeddings" / name
                for split in ("train", "valid"):
                    volumes = out / "cohort" / "dataset" / f"{split}_fixed"
                    commands.append(
                        embed(name, volumes, embeddings / split, size, out, amp_dtype, split=split)
                    )
                probe: dict[str, Any] = {
                    "embeddings_dir": embeddings,
                    "labels_dir": labels,
                    "ct_dir": out / "cohort" / "dataset" / "valid_fixed",
                    "output_dir": out / "scaling" / name,
                    "results_csv": out / "results" / "scaling.csv",
                    "standardize": True,
                    "num_seeds": 1,
                }
                configs = ["bundles/eval_ct_rate/configs/train.json", f"{size.overlays}/eval.json"]
                commands.append(bundle("bundles/eval_ct_rate", configs, **probe))
                stages.append(Stage(f"scaling {name}", commands, ("shards",)))
    return stages


def points(rows: list[ResultRow], encoder: str, metric: str) -> dict[int, list[float]]:
    """Return the values of an encoder by training steps, one a seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row.protocol == PROTOCOL and row.metric == metric and row.encoder.startswith(f"{encoder}_"):
            steps = row.encoder.removeprefix(f"{encoder}_").split("_steps_seed_")[0]
            found.setdefault(int(steps), []).append(row.value)
    return dict(sorted(found.items()))


def draw_panel(
    axes: Axes, rows: list[ResultRow], floors: list[ResultRow], metric: str, views_per_step: int
) -> None:
    """Draw one metric: a line an encoder through the means over seeds, each training a dot, floors as levels.

    The interval of a floor is that over resamples of patients.
    """
    for encoder in ENCODERS:
        values = points(rows, encoder, metric)
        views = [steps * views_per_step for steps in values]
        means = [np.mean(of_steps) for of_steps in values.values()]
        axes.plot(views, means, color=COLOURS[encoder], label=encoder, linewidth=1.5)
        for seen, of_steps in zip(views, values.values(), strict=True):
            axes.plot([seen] * len(of_steps), of_steps, "o", color=COLOURS[encoder], markersize=4)
    for row in floors:
        if row.protocol == PROTOCOL and row.metric == metric and row.encoder in FLOORS:
            colour = COLOURS[row.encoder]
            axes.axhline(row.value, color=colour, linestyle="--", linewidth=1.2, label=row.encoder)
            axes.axhspan(row.low, row.high, color=colour, alpha=0.08, linewidth=0)
    axes.set(xscale="log", xlabel="views seen", title=MEASURES[metric])
    axes.grid(alpha=0.25)


def draw(out: Path, views_per_step: int) -> Path:
    """Draw the curve of all trainings that are done into ``out/scaling.png`` and return its path."""
    rows = read_rows(out / "results" / "scaling.csv")
    floors = read_rows(out / "results" / "eval_ct_rate.csv")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), MEASURES, strict=True):
        draw_panel(axes, rows, floors, metric, views_per_step)
    handles, labels = axes.get_legend_handles_labels()
    figure.suptitle(
        "Table III on synthetic CT, standardized probes: trainings (dots), their mean, and floors"
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path = out / "scaling.png"
    write_figure(path, figure, dpi=110)
    return path


def views_a_step(size: Size) -> int:
    """Return how many views a step of the size's training takes: slabs times global and local views."""
    knobs: dict[str, Any] = {}
    for config in ("bundles/dale_ct_2s/configs/train.json", f"{size.overlays}/train.json"):
        knobs |= json.loads((REPOSITORY / config).read_text(encoding="utf-8"))
    return int(knobs["batch_size"]) * (int(knobs["num_global"]) + int(knobs["num_local"]))


def main(
    max_steps: Annotated[int, typer.Option(help=f"Longest training, of {STEPS}.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Trainings of each length.", min=1)] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the study. Default: study/out/small, made if it isn't there."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List stages and what is done, and stop.")] = False,
) -> None:
    """Draw AUROC and AUPRC of the study's encoders against the views they were trained on.

    Example: python -m study.scaling --max-steps 1000 --seeds 3
    """
    size = SIZES["small"]
    folder = folder_of("small", out)
    stages = scaling_stages(size, folder, amp_dtype(), max_steps=max_steps, seeds=seeds)
    run_stages(stages, folder, f"Scaling curve of {len(stages)} stages.", show=show)
    if not show:
        typer.echo(f"Wrote '{draw(folder, views_a_step(size))}'.")


if __name__ == "__main__":
    typer.run(main)
