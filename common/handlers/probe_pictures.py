"""Pictures of a tested probe: curves, reliability, and what it attends to."""

# N volumes, C classes, S slices

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.cohort.predictions import Predictions
from common.embeddings.sources import ct_sources
from common.metrics.calibration import expected_calibration_error, reliability, wilson_interval
from common.metrics.multilabel import auroc, average_precision, operating_points

BLUE, RED, GREY = "#4477aa", "#ee6677", "0.6"
COLUMNS = 6
NUM_SHOWN = 4  # slices of a volume
SHOWN_HU = (-1000.0, 400.0)  # from air to enhanced vessels

DrawClass = Callable[[Axes, np.ndarray, np.ndarray, float], str]


def draw_per_class(path: Path, reports: Mapping[str, Any], intervals: Mapping[str, Any], title: str) -> None:
    """Draw AUROC and AUPRC of each class as bars with intervals; a mark shows the AUPRC of prevalence alone.

    Args:
        path: PNG to write.
        reports: ``engine.state.reports``.
        intervals: ``engine.state.intervals``.
        title: first line of the picture.
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
    axes.scatter(
        marks,
        [place + 0.2 for place in places],
        marker="|",
        s=90,
        color="black",
        label="prevalence",
        zorder=3,
    )
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
    figure.savefig(path, dpi=120)


def draw_roc(path: Path, predictions: Predictions, intervals: Mapping[str, Any], title: str) -> None:
    """Draw the ROC curve of each class; a dot marks the threshold.

    Args:
        path: PNG to write.
        predictions: of the test set.
        intervals: bootstrap intervals by class and metric.
        title: first line of the picture.
    """

    def draw(axes: Axes, scores: np.ndarray, targets: np.ndarray, threshold: float) -> str:
        points = operating_points(scores, targets)
        axes.plot(points.false_positive_rate, points.recall, color=BLUE, linewidth=1.4)
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        called, positive = scores >= threshold, targets == 1
        axes.plot(called[~positive].mean(), called[positive].mean(), "o", color=RED, markersize=5)
        return f"AUROC {_single(auroc, scores, targets):.3f}"

    labels = ("false positive rate", "sensitivity")
    _draw_classes(path, predictions, intervals, f"{title}\nROC; dot: threshold from validation", labels, draw)


def draw_precision_recall(
    path: Path, predictions: Predictions, intervals: Mapping[str, Any], title: str
) -> None:
    """Draw the precision-recall curve of each class; a dot marks the threshold, a line the prevalence.

    Args:
        path: PNG to write.
        predictions: of the test set.
        intervals: bootstrap intervals by class and metric.
        title: first line of the picture.
    """

    def draw(axes: Axes, scores: np.ndarray, targets: np.ndarray, threshold: float) -> str:
        points = operating_points(scores, targets)
        # precision belongs to the whole step of recall that leads to a point, as average precision counts it
        found = np.flatnonzero(points.recall > 0)
        recall, precision = (values[[found[0], *found]] for values in (points.recall, points.precision))
        recall[0] = 0.0
        axes.step(recall, precision, where="pre", color=BLUE, linewidth=1.4)
        axes.axhline(targets.mean(), color=GREY, linewidth=0.8, linestyle=":")
        called, positive = scores >= threshold, targets == 1
        if called.any():
            axes.plot(called[positive].mean(), positive[called].mean(), "o", color=RED, markersize=5)
        return f"AUPRC {_single(average_precision, scores, targets):.3f}"

    title = f"{title}\nPrecision and recall; dot: threshold from validation, dotted: prevalence"
    _draw_classes(path, predictions, intervals, title, ("recall", "precision"), draw)


def draw_reliability(path: Path, predictions: Predictions, title: str) -> None:
    """Draw predicted against observed shares of each class, in ten bins of equal number.

    Args:
        path: PNG to write.
        predictions: of the test set.
        title: first line of the picture.
    """

    def draw(axes: Axes, scores: np.ndarray, targets: np.ndarray, threshold: float) -> str:
        bins = reliability(scores, targets)
        low, high = wilson_interval(bins.observed, bins.counts)
        right, top = 1.1 * float(bins.predicted.max()), 1.05 * float(max(high.max(), bins.predicted.max()))
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        axes.vlines(bins.predicted, low, high, color=BLUE, linewidth=0.8)
        axes.plot(bins.predicted, bins.observed, "o-", color=BLUE, markersize=3.5, linewidth=1)
        axes.axvline(threshold, color=RED, linewidth=0.8)
        axes.set(xlim=(0, right), ylim=(0, top))
        return f"ECE {expected_calibration_error(bins):.3f}"

    title = f"{title}\nReliability, bins of equal number with 95 % intervals; red: threshold from validation"
    _draw_classes(path, predictions, None, title, ("predicted probability", "observed share"), draw)


def _draw_classes(
    path: Path,
    predictions: Predictions,
    intervals: Mapping[str, Any] | None,
    title: str,
    labels: tuple[str, str],
    draw: DrawClass,
) -> None:
    """One panel a class; ``draw`` returns what stands under its name: where there are intervals, a metric."""
    rows = math.ceil(len(predictions.class_names) / COLUMNS)
    columns = min(COLUMNS, len(predictions.class_names))
    figure = Figure(figsize=(1 + 2.3 * columns, 0.9 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, name in enumerate(predictions.class_names):
        axes, targets = panels[index], predictions.labels[:, index]
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.tick_params(labelsize=7)
        heading = textwrap.fill(name, 24)
        if targets.all() or not targets.any():
            axes.text(0.5, 0.5, "undefined", ha="center", va="center", color=GREY)
            axes.set_title(f"{heading}\n{int(targets.sum())} of {len(targets)}", fontsize=8)
            continue
        note = draw(axes, predictions.probabilities[:, index], targets, float(predictions.thresholds[index]))
        if intervals is not None:
            note += " ({:.3f}-{:.3f})".format(*intervals[name][note.split()[0].lower()])
        axes.set_title(f"{heading}\n{note}", fontsize=8)
    for axes in panels[len(predictions.class_names) :]:
        axes.axis("off")
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _single(
    metric: Callable[[np.ndarray, np.ndarray], np.ndarray], scores: np.ndarray, targets: np.ndarray
) -> float:
    return float(metric(scores[:, None], targets[:, None])[0])


def volumes_to_show(predictions: Predictions, most: int = 8) -> dict[str, str]:
    """Choose volumes to look at: of each class the true positive that the probe is surest of.

    Classes that it never finds are passed over, and a volume is chosen once, for its first class.

    Args:
        predictions: of the test set.
        most: volumes to choose at most.

    Returns:
        Volume to the class it was chosen for.
    """
    chosen: dict[str, str] = {}
    for index, name in enumerate(predictions.class_names):
        scores, targets = predictions.probabilities[:, index], predictions.labels[:, index]
        found = np.flatnonzero((targets == 1) & (scores >= predictions.thresholds[index]))
        if len(found) and len(chosen) < most:
            chosen.setdefault(predictions.volumes[found[scores[found].argmax()]], name)
    return chosen


def draw_attention(
    path: Path,
    weights: Mapping[str, np.ndarray],
    captions: Mapping[str, str],
    slices: Mapping[str, np.ndarray],
    unit: str,
) -> None:
    """Draw how much each token of some volumes contributes to what the probe reads.

    Args:
        path: PNG to write.
        weights: volume to the weights ``(T,)`` of its tokens, which add up to 1.
        captions: volume to what stands above its panel.
        slices: volume to its CT ``(T, H, W)`` in HU, of which those of most weight are shown; may be empty.
        unit: what a token is of: "slice", feet to head, or "token" for anything else.
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
            picture.imshow(slices[volume][index], cmap="gray", vmin=SHOWN_HU[0], vmax=SHOWN_HU[1])
            picture.set_title(f"slice {index}: {relative[index]:.2f}", fontsize=8)
            picture.axis("off")
    figure.supxlabel("slice, feet to head" if unit == "slice" else "token, as stored", fontsize=9)
    figure.supylabel("weight / mean weight", fontsize=9)
    figure.savefig(path, dpi=110)


def read_slices(ct_dir: str | Path, volumes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read CT volumes as axial slices, feet to head, shown the radiological way.

    Args:
        ct_dir: what embeddings were made of: whatever ``ct_sources`` reads.
        volumes: volumes to read.

    Returns:
        Volume to its slices ``(S, H, H)`` in HU.

    Raises:
        FileNotFoundError: if a volume is not there.
        RejectedError: if one cannot be read.
    """
    found = {source.volume: source for source in ct_sources(ct_dir)[0]}
    missing = [volume for volume in volumes if volume not in found]
    if missing:
        raise FileNotFoundError(f"No CT of '{missing[0]}' in '{ct_dir}'.")
    return {volume: found[volume].read().hu for volume in volumes}
