"""Pictures and tables of a tested probe: scores by class, ROC, precision-recall, reliability, attention."""

# N volumes, T tokens of a volume, H W pixels

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from common.metrics.bootstrap import IntervalReport
from common.metrics.multilabel import (
    METRICS,
    MultilabelReport,
    balanced_accuracy,
    expected_calibration_error,
    f1,
    reliability,
)
from common.reports.results import Predictions
from common.reports.slice_grid import PALETTE, show_slice
from common.run.process import write_figure

BLUE, RED = PALETTE[:2]
GREY = "0.6"
COLUMNS = 6
NUM_SHOWN = 4  # slices per volume


def draw_per_class(
    path: Path,
    reports: Mapping[str, MultilabelReport],
    intervals: Mapping[str, IntervalReport],
    title: str,
) -> None:
    """Draw AUROC and AUPRC of each class as bars with intervals; a mark shows the AUPRC of prevalence alone.

    Reports and intervals are those of ``engine.state``, of "probe" and "prevalence".
    """
    per_class, floor = reports["probe"]["per_class"], reports["prevalence"]["per_class"]
    places = range(len(per_class))
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(per_class)), layout="constrained")
    axes = figure.subplots()
    for metric, shift, colour in (("auroc", -0.2, BLUE), ("auprc", 0.2, RED)):
        values = [values[metric] for values in per_class.values()]
        heights = [place + shift for place in places]
        axes.barh(heights, values, height=0.38, color=colour, label=metric.upper())
        ends = [intervals["probe"]["per_class"][name][metric] for name in per_class]
        axes.hlines(heights, *zip(*ends, strict=True), color="0.25", linewidth=0.9)
        for height, value, (_, high) in zip(heights, values, ends, strict=True):
            text = "undefined" if math.isnan(value) else f"{value:.3f}"
            axes.text(np.nanmax([0, value, high]) + 0.01, height, text, va="center", fontsize=7)
    marks = [floor[name]["auprc"] for name in per_class]
    heights = [place + 0.2 for place in places]
    axes.scatter(marks, heights, marker="|", s=90, color="black", label="prevalence", zorder=3)
    axes.axvline(0.5, color=BLUE, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(places, per_class)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("test set, 95 % intervals; dotted: AUROC of chance")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)
    macro = ", ".join(
        "{} {:.4f} ({:.4f}-{:.4f})".format(
            metric.upper(), reports["probe"]["macro"][metric], *intervals["probe"]["macro"][metric]
        )
        for metric in ("auroc", "auprc")
    )
    axes.set_title(f"{title}\nmacro {macro}", fontsize=10)
    write_figure(path, figure)


def draw_classes(
    path: Path, *, kind: str, predictions: Predictions, intervals: Mapping[str, Any], title: str
) -> None:
    """Draw a panel per class, with the value of its area or error; classes without both labels are undefined.

    Args:
        path: PNG to write.
        kind: one of ``KINDS``.
        predictions: predictions for the test set.
        intervals: bootstrap intervals by class and metric; a reliability curve has none.
        title: first line of the picture.
    """
    draw, about, labels = KINDS[kind]
    names = predictions.class_names
    rows, columns = math.ceil(len(names) / COLUMNS), min(COLUMNS, len(names))
    figure = Figure(figsize=(1 + 2.3 * columns, 0.9 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.axis("off")
    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        targets, scores = predictions.labels[:, index], predictions.probabilities[:, index]
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.tick_params(labelsize=7)
        if targets.all() or not targets.any():
            axes.text(0.5, 0.5, "undefined", ha="center", va="center", color=GREY)
            note = f"{int(targets.sum())} of {len(targets)}"
        else:
            metric, value = draw(axes, scores, targets, float(predictions.thresholds[index]))
            note = f"{metric} {value:.3f}"
            if metric.lower() in intervals[name]:
                note += " ({:.3f}-{:.3f})".format(*intervals[name][metric.lower()])
        axes.set_title(f"{textwrap.fill(name, 24)}\n{note}", fontsize=8)
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    figure.suptitle(f"{title}\n{about}", fontsize=11)
    write_figure(path, figure, dpi=110)


def _roc(axes: Axes, scores: np.ndarray, targets: np.ndarray, threshold: float) -> tuple[str, float]:
    false_positive_rate, recall, _ = roc_curve(targets, scores, drop_intermediate=False)
    axes.plot(false_positive_rate, recall, color=BLUE, linewidth=1.4)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    called, positive = scores >= threshold, targets == 1
    axes.plot(called[~positive].mean(), called[positive].mean(), "o", color=RED, markersize=5)
    return "AUROC", float(roc_auc_score(targets, scores))


def _precision_recall(
    axes: Axes, scores: np.ndarray, targets: np.ndarray, threshold: float
) -> tuple[str, float]:
    precision, recall, _ = precision_recall_curve(targets, scores)
    precision, recall = precision[::-1], recall[::-1]
    # precision belongs to the whole step of recall that leads to a point, as average precision counts it
    found = np.flatnonzero(recall > 0)
    steps = precision[[found[0], *found]]
    axes.step([0.0, *recall[found]], steps, where="pre", color=BLUE, linewidth=1.4)
    axes.axhline(targets.mean(), color=GREY, linewidth=0.8, linestyle=":")
    called, positive = scores >= threshold, targets == 1
    if called.any():
        axes.plot(called[positive].mean(), positive[called].mean(), "o", color=RED, markersize=5)
    return "AUPRC", float(average_precision_score(targets, scores))


def _reliability(axes: Axes, scores: np.ndarray, targets: np.ndarray, threshold: float) -> tuple[str, float]:
    bins = reliability(scores, targets)
    tests = [binomtest(int(k), int(n)) for k, n in zip(bins.positives, bins.counts, strict=True)]
    low, high = zip(*(test.proportion_ci(method="wilson") for test in tests), strict=True)
    top = 1.05 * max(*high, float(bins.predicted.max()))
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    axes.vlines(bins.predicted, low, high, color=BLUE, linewidth=0.8)
    axes.plot(bins.predicted, bins.observed, "o-", color=BLUE, markersize=3.5, linewidth=1)
    axes.axvline(threshold, color=RED, linewidth=0.8)
    axes.set(xlim=(0, 1.1 * float(bins.predicted.max())), ylim=(0, top))
    return "ECE", expected_calibration_error(bins)


KINDS = {
    "roc": (_roc, "ROC; dot: threshold from validation", ("false positive rate", "sensitivity")),
    "precision_recall": (
        _precision_recall,
        "Precision and recall; dot: threshold from validation, dotted: prevalence",
        ("recall", "precision"),
    ),
    "reliability": (
        _reliability,
        "Reliability, bins of equal number with 95 % intervals; red: threshold from validation",
        ("predicted probability", "observed share"),
    ),
}
"""How each kind of curve is drawn, what stands above the picture, and its axes."""


def draw_attention(
    path: Path,
    *,
    weights: Mapping[str, np.ndarray],
    captions: Mapping[str, str],
    slices: Mapping[str, np.ndarray],
    unit: str,
) -> None:
    """Draw how much each token of some volumes contributes to what the probe reads.

    Args:
        path: PNG to write.
        weights: volume to the weights ``(T,)`` of its tokens, which add up to 1.
        captions: volume to the text above its panel.
        slices: volume to its CT ``(T, H, W)`` in HU, to show the slices of most weight; may be empty.
        unit: what a token stands for: "slice", feet to head, or "token" for anything else.
    """
    shown = NUM_SHOWN if slices else 0
    figure = Figure(figsize=(8 + 1.7 * shown, 0.8 + 1.9 * len(weights)), layout="constrained")
    grid = figure.add_gridspec(len(weights), 1 + shown, width_ratios=[4.0, *[1.0] * shown])
    for row, (volume, weight) in enumerate(weights.items()):
        relative = weight * len(weight)
        axes = figure.add_subplot(grid[row, 0])
        axes.bar(np.arange(len(weight)), relative, width=1.0, color=BLUE)
        axes.axhline(1.0, color=RED, linewidth=0.8, linestyle=":")
        axes.set(xlim=(-0.5, len(weight) - 0.5), ylim=(0, max(1.5, 1.1 * float(relative.max()))))
        axes.set_title(textwrap.fill(captions[volume], 120), fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
        for column, index in enumerate(np.argsort(-weight, kind="stable")[:shown]):
            picture = figure.add_subplot(grid[row, 1 + column])
            show_slice(picture, slices[volume][index], f"slice {index}: {relative[index]:.2f}")
    figure.supxlabel("slice, feet to head" if unit == "slice" else "token, as stored", fontsize=9)
    figure.supylabel("weight / mean weight", fontsize=9)
    write_figure(path, figure, dpi=110)


def class_rows(
    reports: Mapping[str, MultilabelReport], intervals: Mapping[str, IntervalReport], test: Predictions
) -> list[dict[str, Any]]:
    """Return one row per class: its metrics with intervals, its calibration, and how often it occurs."""
    brier, rows = np.square(test.probabilities - test.labels).mean(0), []
    for index, (name, values) in enumerate(reports["probe"]["per_class"].items()):
        ends = intervals["probe"]["per_class"][name]
        numbers = {metric: values[metric] for metric in METRICS}
        numbers |= {
            f"{metric}_{end}": number
            for metric in METRICS
            for end, number in zip(("low", "high"), ends[metric], strict=True)
        }
        numbers["auprc_of_prevalence"] = reports["prevalence"]["per_class"][name]["auprc"]
        bins = reliability(test.probabilities[:, index], test.labels[:, index])
        numbers |= {"brier": brier[index], "calibration_error": expected_calibration_error(bins)}
        numbers["threshold"] = test.thresholds[index]
        rows.append(
            {"class": name, **{column: f"{number:.6f}" for column, number in numbers.items()}}
            | {"positives": int(test.labels[:, index].sum()), "volumes": len(test.volumes)}
        )
    return rows


def threshold_rows(validation: Predictions, test: Predictions) -> list[dict[str, Any]]:
    """Return what each threshold does on validation, where it was chosen, and on the test set, by class."""
    rows = []
    for index, name in enumerate(test.class_names):
        row = {"class": name, "threshold": repr(float(test.thresholds[index]))}
        for cohort, of_cohort in (("validation", validation), ("test", test)):
            scores, targets = of_cohort.probabilities[:, [index]], of_cohort.labels[:, [index]]
            threshold = of_cohort.thresholds[[index]]
            called, positive = scores[:, 0] >= threshold, targets[:, 0] == 1
            shares = {
                "f1": float(f1(scores, targets, threshold)[0]),
                "balanced_accuracy": float(balanced_accuracy(scores, targets, threshold)[0]),
                "sensitivity": _mean(called[positive]),
                "specificity": _mean(~called[~positive]),
                "positive_predictive_value": _mean(positive[called]),
                "negative_predictive_value": _mean(~positive[~called]),
            }
            row |= {f"{cohort}_{metric}": f"{value:.6f}" for metric, value in shares.items()}
            row |= {f"{cohort}_positives": str(positive.sum()), f"{cohort}_called": str(called.sum())}
        rows.append(row)
    return rows


def seed_rows(seeds: Sequence[int], reports: Sequence[MultilabelReport]) -> list[dict[str, Any]]:
    """Return one row per seed with the macro metrics of the chosen probe."""
    return [
        {"seed": seed, **{f"macro_{metric}": f"{report['macro'][metric]:.6f}" for metric in METRICS}}
        for seed, report in zip(seeds, reports, strict=True)
    ]


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else float("nan")
