"""Draw the recorded curves of several runs side by side, one panel a metric."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient

PANELS = ("invariance", "sigreg", "aux", "grad_norm", "cls_effective_rank", "projection_ks")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")


def main(
    tracking_uri: Annotated[str, typer.Option(help="MLflow store, such as sqlite:///demo/out/mlflow.db.")],
    run: Annotated[
        list[str], typer.Option(help="Name of a run; once for each. The newest of a name counts.")
    ],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    experiment: Annotated[str, typer.Option(help="Experiment of the runs.")] = "pretraining",
) -> None:
    """Draw training curves.

    Example: python -m study.draw_curves --tracking-uri sqlite:///demo/out/mlflow.db --run dale_ct_2s
    --out curves.png
    """
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    known = client.search_runs([found.experiment_id]) if found else []
    ids = {item.info.run_name: item.info.run_id for item in reversed(known)}  # the newest comes first
    missing = [name for name in run if name not in ids]
    if missing:
        sys.exit(f"run must be one of {sorted(ids)}, got '{missing[0]}' in '{tracking_uri}'.")
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, metric in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name, colour in zip(run, COLOURS, strict=False):
            history = sorted(client.get_metric_history(ids[name], metric), key=lambda point: point.step)
            steps, values = [point.step for point in history], [point.value for point in history]
            axes.plot(steps, values, label=name, color=colour, linewidth=1.2)
        axes.set(title=metric, xlabel="step")
        axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(run), frameon=False)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    typer.run(main)
