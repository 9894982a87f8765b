"""What the dense evaluation leaves: chosen probes, Table I's rows, all classes as table and picture."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from common.engines.dense_probe import DenseProbeTrainer
from common.handlers.results_table import add_rows, code_version, config_hash
from common.networks.dense_probe import save_dense_probe
from common.run.atomic_file import atomic_file

KIND_NAMES = {"cls": "CLS tokens: slices", "patch": "patch tokens"}


class DenseReport:
    """Write results when a ``DenseProbeTrainer`` has completed.

    Files, for both kinds of token and both tasks: ``<kind>_<task>.safetensors`` and ``.json`` (see
    :func:`common.networks.dense_probe.load_dense_probe`), ``<kind>_<task>.csv`` and ``.png`` by class;
    ``resamples.npz`` for :mod:`common.handlers.dense_differences`. Rows in the results CSV: protocol
    ``dense_<kind>``, dataset the task, macro AUROC and AUPRC with intervals.

    Args:
        output_dir: folder of the files.
        results_csv: CSV of all evaluations; made when missing.
        seed: seed of the run.
        config: settings that the numbers depend on, JSON values; their hash goes into the rows.
    """

    def __init__(
        self, output_dir: str | Path, results_csv: str | Path, seed: int, config: dict[str, Any]
    ) -> None:
        self.output_dir = Path(output_dir)
        self.results_csv = Path(results_csv)
        self.seed = seed
        self.config = config

    def attach(self, engine: Engine) -> None:
        """Register with a ``DenseProbeTrainer``."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: DenseProbeTrainer) -> None:
        if getattr(engine.state, "stopped_early", False):
            return
        cohort, version, rows = engine.test_cohort, code_version(), []
        for (kind, task), report in engine.state.reports.items():
            chosen = engine.best.chosen[kind, task]
            rate = engine.probes.learning_rates[chosen["rate"]]
            card = {
                "kind": kind,
                "task": task,
                "class_names": engine.class_names[task],
                "learning_rate": rate,
                "step": chosen["step"],
                "seed": self.seed,
                "validation_macro_auprc": chosen["auprc"],
                **{name: value for name, value in cohort.identity.items() if name != "dtype"},
                "test": {name: _json_number(mean) for name, (mean, _) in report["macro"].items()},
                "left_out": report["left_out"],
            }
            save_dense_probe(self.output_dir, kind, task, engine.best.layer((kind, task)), card)
            write_classes(self.output_dir / f"{kind}_{task}.csv", report)
            title = f"{cohort.identity['encoder']}, {KIND_NAMES[kind]}, {task}"
            draw_classes(
                self.output_dir / f"{kind}_{task}.png", report, f"{title}: lr {rate:g}, step {chosen['step']}"
            )
            rows += [
                {
                    "encoder": cohort.identity["encoder"],
                    "protocol": f"dense_{kind}",
                    "dataset": task,
                    "metric": f"macro_{metric}",
                    "value": f"{mean:.6f}",
                    "low": f"{low:.6f}",
                    "high": f"{high:.6f}",
                    "n": str(len(cohort.volumes)),
                    "seeds": str(self.seed),
                    "commit": version,
                    "config_hash": config_hash(self.config),
                }
                for metric, (mean, (low, high)) in report["macro"].items()
            ]
        drawn: dict[str, Any] = {
            f"{kind} {task} {metric}": np.append(report["macro"][metric][0], means)
            for (kind, task), report in engine.state.reports.items()
            for metric, means in report["resampled"].items()
        }
        drawn |= {
            f"{kind} {task} classes": [name for name in report["per_class"] if name not in report["left_out"]]
            for (kind, task), report in engine.state.reports.items()
        }
        with atomic_file(self.output_dir / "resamples.npz", "wb") as file:
            np.savez(file, encoder=cohort.identity["encoder"], volumes=cohort.volumes, **drawn)
        add_rows(self.results_csv, rows)


def write_classes(path: Path, report: dict[str, Any]) -> None:
    """Write one row a class: its metrics, how often it occurs, and whether it counts in the means.

    Args:
        path: file to write.
        report: of ``report_on_test``.
    """
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "auroc", "auprc", "prevalence", "positives", "averaged"])
        for name, values in report["per_class"].items():
            numbers = [f"{values[metric]:.6f}" for metric in ("auroc", "auprc", "prevalence")]
            averaged = int(name not in report["left_out"])
            writer.writerow([name, *numbers, values["positives"], averaged])


def draw_classes(path: Path, report: dict[str, Any], title: str) -> None:
    """Draw AUROC and AUPRC of each averaged class as points, with its prevalence, by AUPRC.

    Args:
        path: PNG to write.
        report: of ``report_on_test``.
        title: first line of the picture.
    """
    averaged = {
        name: values for name, values in report["per_class"].items() if name not in report["left_out"]
    }
    names = sorted(averaged, key=lambda name: averaged[name]["auprc"])
    places = np.arange(len(names))
    figure = Figure(figsize=(8, 1.8 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    auprc, auroc, prevalence = (
        [averaged[name][metric] for name in names] for metric in ("auprc", "auroc", "prevalence")
    )
    axes.hlines(places, prevalence, auprc, color="#ee6677", linewidth=2.5, alpha=0.35)
    axes.scatter(auprc, places, color="#ee6677", s=28, label="AUPRC", zorder=3)
    axes.scatter(prevalence, places, color="black", marker="|", s=60, label="prevalence: AUPRC of chance")
    axes.scatter(auroc, places, color="#4477aa", s=28, marker="D", label="AUROC", zorder=3)
    axes.axvline(0.5, color="#4477aa", linewidth=0.8, linestyle=":", zorder=0)
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
    out = f"{len(averaged)} classes averaged, {len(report['left_out'])} left out"
    axes.set_title(f"{title}\nmacro {means}\n{out}", fontsize=9)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
