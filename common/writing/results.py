"""What training of reports leaves behind: the model, what it wrote, tables, a picture and result rows."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from safetensors.torch import save

from common.cohort.cohort import write_table
from common.handlers.probe_report import EvaluationReport
from common.metrics.bootstrap import interval
from common.networks.mil_probe import without_nan
from common.reports.results import ResultRow
from common.run.process import atomic_file, write_figure
from common.writing.labels import CLASS_NAMES
from common.writing.model import CARD, LANGUAGE, WEIGHTS
from common.writing.trainer import REAL, ReportTrainer


class ReportWriter(EvaluationReport):
    """Write the best weights and what they wrote when a ``ReportTrainer`` has completed.

    Files: ``report.safetensors`` (what learned), ``report.json`` (what it belongs to) and ``language_model``
    (vocabulary and shape of the language model); ``reports.csv``, the radiologist's text and those written
    from each condition; ``per_class.csv`` and ``scores.png``.

    Rows in the results CSV: for the embeddings of protocol ``<protocol>``; for each control and floor
    ``<protocol>_<condition>``, and ``<protocol>-<condition>`` for the paired differences of "real" from it
    and ``share_of_f1_owed``, the share of the macro F1 that is lost without the image.

    Args:
        protocol: name of the evaluation.
        dataset_name: name of the data.
        card: what ``report.json`` says beside the scores, JSON values.
        others: as :class:`EvaluationReport`.
    """

    def __init__(self, *, protocol: str, dataset_name: str, card: dict[str, Any], **others: Any) -> None:  # noqa: ANN401 (EvaluationReport's)
        super().__init__(**others)
        self.protocol, self.dataset_name, self.card = protocol, dataset_name, card

    def results(self, engine: ReportTrainer) -> list[ResultRow]:
        """Return the result rows."""
        test = engine.cohorts["test"]
        facts = {"encoder": test.identity["encoder"], "dataset": self.dataset_name, "n": len(test)}
        rows = []
        for name, numbers in engine.state.reports.items():
            protocol = self.protocol if name == REAL else f"{self.protocol}_{name}"
            rows += self.rows(numbers, protocol=protocol, **facts)
        for name, numbers in engine.state.differences.items():
            rows += self.rows(numbers, protocol=f"{self.protocol}-{name}", **facts)
        return rows

    def write(self, engine: ReportTrainer) -> None:
        """Write the files."""
        state, test = engine.state, engine.cohorts["test"]
        network = engine.model
        # with the bridge's means and deviations of the training tokens, which do not learn
        bridge = {
            f"bridge.{name}".replace(".", "/"): weight for name, weight in network.bridge.state_dict().items()
        }
        weights = {name: weight.cpu() for name, weight in (bridge | engine.best.parameters).items()}
        with atomic_file(self.output_dir / WEIGHTS) as file:
            file.write(save(weights))
        identity = {name: value for name, value in test.identity.items() if name != "dtype"}
        scores = {"step": engine.best.step, "validation_loss": engine.best.loss, "test": state.reports}
        with atomic_file(self.output_dir / CARD, "w", encoding="utf-8") as file:
            card = self.card | {"embeddings": identity} | scores
            file.write(json.dumps(without_nan(card), indent=2, allow_nan=False) + "\n")
        network.tokenizer.save_pretrained(self.output_dir / LANGUAGE)
        network.language.config.save_pretrained(self.output_dir / LANGUAGE)
        columns = {"volume": test.volumes, "reference": engine.texts["test"]}
        for name, written in state.written.items():
            columns |= {name: [one.text for one in written], f"{name}_ended": [one.ended for one in written]}
        rows = zip(*columns.values(), strict=True)
        write_table(self.output_dir / "reports.csv", [dict(zip(columns, row, strict=True)) for row in rows])
        table = [
            {"class": name, "positives": int(state.labels[:, index].sum())}
            | {f"f1_{who}": f"{of_who['f1'][0, index]:.4f}" for who, of_who in state.samples.items()}
            for index, name in enumerate(CLASS_NAMES)
        ]
        write_table(self.output_dir / "per_class.csv", table)
        title = f"{identity['encoder']}: reports of {len(test)} test volumes, step {engine.best.step}"
        draw_scores(self.output_dir / "scores.png", state.reports, state.samples, title)


def draw_scores(
    path: str | Path, numbers: dict[str, Any], samples: dict[str, dict[str, np.ndarray]], title: str
) -> None:
    """Draw the macro F1 of the embeddings, controls and floors, and below the F1 of each class, real or not.

    Args:
        path: PNG to write.
        numbers: condition to metric to value and interval.
        samples: condition to metric to ``(1 + R, C)``.
        title: heading.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 3))
    names = list(numbers)
    values, low, high = np.array([numbers[name]["macro_f1"] for name in names]).T
    colors = ["tab:blue", *["0.7"] * (len(names) - 1)]
    top.barh(names, values, xerr=np.maximum([values - low, high - values], 0), color=colors, capsize=3)
    top.invert_yaxis()
    top.set(title=title, xlabel="macro F1, 95 % interval over test patients", xlim=(0, 1))
    place = np.arange(len(CLASS_NAMES))
    shown = [name for name in (REAL, "shuffled", names[-1]) if name in samples]
    for number, name in enumerate(shown):
        f1 = samples[name]["f1"]
        ends = np.array([interval(f1[1:, index]) for index in place]).T
        across = place + 0.25 * (number - 1)
        error = np.nan_to_num(np.maximum([f1[0] - ends[0], ends[1] - f1[0]], 0))
        bottom.errorbar(np.nan_to_num(f1[0], nan=-math.inf), across, xerr=error, fmt="o", ms=4, label=name)
    bottom.set(yticks=place, yticklabels=CLASS_NAMES, xlabel="F1", xlim=(-0.02, 1.02))
    bottom.invert_yaxis()
    bottom.legend(loc="lower right")
    write_figure(path, figure)
