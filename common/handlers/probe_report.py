"""What an evaluation leaves behind: the chosen probe, a table and a picture of its classes."""

import csv
import math
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from common.data.embeddings import EmbeddingBags
from common.engines.probe_grid import ProbeGridTrainer
from common.networks.mil_probe import save_probe

METRICS = ("auroc", "auprc", "f1", "balanced_accuracy")


class ProbeReport:
    """Write the chosen probe and its test results by class when a ``ProbeGridTrainer`` has completed.

    Files: ``probe.safetensors`` and ``probe.json`` (see :func:`common.networks.mil_probe.load_probe`),
    ``per_class.csv`` and ``per_class.png``.

    Args:
        output_dir: folder of the files.
        seed: seed of the run, remembered in ``probe.json``.
    """

    def __init__(self, output_dir: str | Path, seed: int) -> None:
        self.output_dir = Path(output_dir)
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register with a ``ProbeGridTrainer``."""
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _write(self, engine: ProbeGridTrainer) -> None:
        if getattr(engine.state, "stopped_early", False):
            return
        best, bags, report = engine.best, engine.test_bags, engine.state.reports["probe"]
        pooler, learning_rate = engine.grid.names[best.index]
        card = {
            "pooler": pooler,
            "learning_rate": learning_rate,
            "step": best.step,
            "seed": self.seed,
            "validation_macro_auprc": best.auprc,
            "class_names": bags.class_names,
            "thresholds": best.thresholds.tolist(),
            **{name: value for name, value in bags.identity.items() if name != "dtype"},
            "test": {name: _json_number(value) for name, value in report["macro"].items()},
            "undefined_classes": report["undefined"],
        }
        save_probe(self.output_dir, engine.chosen_probe(), card)
        write_per_class_csv(
            self.output_dir / "per_class.csv", engine.state.reports, best.thresholds.tolist(), bags
        )
        encoder = bags.identity["encoder"]
        title = f"{encoder}: {len(bags)} test volumes, {pooler}, lr {learning_rate:g}, step {best.step}"
        draw_per_class(self.output_dir / "per_class.png", engine.state.reports, title)


def write_per_class_csv(
    path: Path, reports: dict[str, dict[str, Any]], thresholds: list[float], bags: EmbeddingBags
) -> None:
    """Write one row a class: its metrics, its threshold and how often it occurs. Undefined is "nan".

    Args:
        path: file to write.
        reports: ``engine.state.reports``.
        thresholds: of each class.
        bags: test volumes.
    """
    positives = bags.labels.sum(0).int().tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", *METRICS, "auprc_of_prevalence", "threshold", "positives", "volumes"])
        for index, (name, values) in enumerate(reports["probe"]["per_class"].items()):
            floor = reports["prevalence"]["per_class"][name]["auprc"]
            numbers = [*(values[metric] for metric in METRICS), floor, thresholds[index]]
            writer.writerow([name, *(f"{number:.6f}" for number in numbers), positives[index], len(bags)])


def draw_per_class(path: Path, reports: dict[str, dict[str, Any]], title: str) -> None:
    """Draw AUROC and AUPRC of each class as bars, with the AUPRC that prevalence alone gives as a mark.

    Args:
        path: PNG to write.
        reports: ``engine.state.reports``.
        title: first line of the picture.
    """
    per_class, floor = reports["probe"]["per_class"], reports["prevalence"]["per_class"]
    places = range(len(per_class))
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(per_class)), layout="constrained")
    axes = figure.subplots()
    for metric, shift, colour in (("auroc", -0.2, "#4477aa"), ("auprc", 0.2, "#ee6677")):
        values = [values[metric] for values in per_class.values()]
        bars = axes.barh(
            [place + shift for place in places], values, height=0.38, color=colour, label=metric.upper()
        )
        texts = ["undefined" if math.isnan(value) else f"{value:.3f}" for value in values]
        axes.bar_label(bars, texts, padding=3, fontsize=7)
    marks = [floor[name]["auprc"] for name in per_class]
    axes.scatter(
        marks,
        [place + 0.2 for place in places],
        marker="|",
        s=90,
        color="black",
        label="prevalence",
        zorder=3,
    )
    axes.axvline(0.5, color="#4477aa", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(places, per_class)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("test set; dotted: AUROC of chance")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)
    macro = ", ".join(
        f"{metric.upper()} {reports['probe']['macro'][metric]:.4f}" for metric in ("auroc", "auprc")
    )
    axes.set_title(f"{title}\nmacro {macro}", fontsize=10)
    figure.savefig(path, dpi=120)


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else value
