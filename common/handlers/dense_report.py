"""What the dense evaluation leaves: chosen probes, Table I's rows, all classes as table and picture."""

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from matplotlib.figure import Figure

from common.cohort.cohort import write_table
from common.engines.dense_probe import DenseProbeTrainer, DenseResults
from common.handlers.probe_report import EvaluationReport
from common.networks.mil_probe import save_probe
from common.reports.results import ResultRow
from common.reports.slice_grid import PALETTE
from common.run.process import atomic_file, write_figure

BLUE, RED = PALETTE[:2]
KIND_NAMES = {"cls": "CLS tokens: slices", "patch": "patch tokens"}


class DenseCard(TypedDict):
    """What is kept beside a chosen probe's weights, along with the identity of its embeddings."""

    kind: str  # of token: "cls" or "patch"
    task: str  # label set
    class_names: list[str]  # in the order of the probe's outputs
    learning_rate: float
    step: int  # optimizer steps taken when it was chosen
    seed: int
    validation_macro_auprc: float  # what it was chosen for
    test: dict[str, float]  # macro AUROC and AUPRC; null where undefined
    left_out: list[str]  # classes that do not count in the means


class DenseReport(EvaluationReport):
    """Write results when a ``DenseProbeTrainer`` has completed.

    Files, for both kinds of token and both tasks: ``<kind>_<task>.safetensors`` and ``.json`` (see
    :func:`common.networks.dense_probe.load_dense_probe`), ``<kind>_<task>.csv`` and ``.png`` by class;
    ``resamples.npz`` for :mod:`common.reports.paired_differences`. Rows in the results CSV: protocol
    ``dense_<kind><suffix>``, dataset the task, macro AUROC and AUPRC with intervals.
    """

    def __init__(self, *, suffix: str, **others: Any) -> None:  # noqa: ANN401 (EvaluationReport's)
        super().__init__(**others)
        self.suffix = suffix

    def results(self, engine: DenseProbeTrainer) -> list[ResultRow]:
        """Return the result rows."""
        cohort, rows = engine.test_cohort, []
        for (kind, task), report in engine.state.reports.items():
            numbers = {f"macro_{metric}": (mean, *ends) for metric, (mean, ends) in report["macro"].items()}
            facts = {"encoder": cohort.identity["encoder"], "dataset": task, "n": len(cohort.volumes)}
            rows += self.rows(numbers, protocol=f"dense_{kind}{self.suffix}", **facts)
        return rows

    def write(self, engine: DenseProbeTrainer) -> None:
        """Write the files."""
        cohort = engine.test_cohort
        drawn: dict[str, Any] = {"encoder": cohort.identity["encoder"], "volumes": cohort.volumes}
        for (kind, task), report in engine.state.reports.items():
            self._write_probe(engine, kind, task, report)
            for metric, means in report["resampled"].items():
                drawn[f"{kind} {task} {metric}"] = np.append(report["macro"][metric][0], means)
            drawn[f"{kind} {task} classes"] = [n for n in report["per_class"] if n not in report["left_out"]]
        with atomic_file(self.output_dir / "resamples.npz", "wb") as file:
            np.savez(file, **drawn)

    def _write_probe(self, engine: DenseProbeTrainer, kind: str, task: str, report: DenseResults) -> None:
        identity, chosen = engine.test_cohort.identity, engine.best.chosen[kind, task]
        rate = engine.probes.learning_rates[chosen["rate"]]
        card: DenseCard = {
            "kind": kind,
            "task": task,
            "class_names": engine.class_names[task],
            "learning_rate": rate,
            "step": chosen["step"],
            "seed": self.seed,
            "validation_macro_auprc": chosen["auprc"],
            "test": {name: mean for name, (mean, _) in report["macro"].items()},
            "left_out": report["left_out"],
        }
        origin = {name: value for name, value in identity.items() if name != "dtype"}
        name = f"{kind}_{task}"
        save_probe(self.output_dir, engine.best.layer((kind, task)), {**card, **origin}, name)
        write_table(self.output_dir / f"{name}.csv", class_rows(report))
        title = f"{identity['encoder']}, {KIND_NAMES[kind]}, {task}: lr {rate:g}, step {chosen['step']}"
        draw_classes(self.output_dir / f"{name}.png", report, title)


def class_rows(report: DenseResults) -> list[dict[str, Any]]:
    """Return one row per class: its metrics, how often it occurs, and whether it counts in the means."""
    return [
        {"class": name}
        | {metric: f"{value:.6f}" for metric, value in values.items() if metric != "positives"}
        | {"positives": values["positives"], "averaged": int(name not in report["left_out"])}
        for name, values in report["per_class"].items()
    ]


def draw_classes(path: Path, report: DenseResults, title: str) -> None:
    """Draw AUROC and AUPRC of each averaged class as points, with its prevalence, in order of AUPRC."""
    averaged = {
        name: values for name, values in report["per_class"].items() if name not in report["left_out"]
    }
    names = sorted(averaged, key=lambda name: averaged[name]["auprc"])
    places = np.arange(len(names))
    figure = Figure(figsize=(8, 1.8 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    auroc, auprc, prevalence = (
        [averaged[name][metric] for name in names] for metric in ("auroc", "auprc", "prevalence")
    )
    axes.hlines(places, prevalence, auprc, color=RED, linewidth=2.5, alpha=0.35)
    axes.scatter(auprc, places, color=RED, s=28, label="AUPRC", zorder=3)
    axes.scatter(prevalence, places, color="black", marker="|", s=60, label="prevalence: AUPRC of chance")
    axes.scatter(auroc, places, color=BLUE, s=28, marker="D", label="AUROC", zorder=3)
    axes.axvline(0.5, color=BLUE, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(-0.7, max(len(names), 1) - 0.3)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.25)
    axes.set_xlabel("test set; dotted: AUROC of chance")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    means = ", ".join(
        f"{metric.upper()} {mean:.4f} ({low:.4f}-{high:.4f})"
        for metric, (mean, (low, high)) in report["macro"].items()
    )
    counts = f"{len(averaged)} classes averaged, {len(report['left_out'])} left out"
    axes.set_title(f"{title}\nmacro {means}\n{counts}", fontsize=9)
    write_figure(path, figure)
