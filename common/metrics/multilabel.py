"""Metrics of several binary labels at once; an undefined class is nan and named, never 0.

Scores ``(..., N, C)`` are on any monotone scale, higher means more likely; leading axes are several probes.
Targets ``(N, C)`` are 0 or 1, thresholds ``(..., C)``, metrics float64 ``(..., C)``. Every function raises
``ValueError`` if shapes do not agree, a score or threshold is nan, or a target is neither 0 nor 1.
"""

# N samples, C classes, M bins

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

METRICS = ("auroc", "auprc", "f1", "balanced_accuracy")
"""The metrics of Tables III and IV, as they are named in reports."""


class MultilabelReport(TypedDict):
    """The four ``METRICS`` of several classes."""

    macro: dict[str, float]  # metric to its mean over the classes where it is defined
    undefined: dict[str, list[str]]  # metric to the names of the other classes
    per_class: dict[str, dict[str, float]]  # class to metric to value, nan where undefined


def auroc(scores: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the area under the ROC curve of each class; ties count half.

    It is nan for a class that lacks positive or negative samples.

    Source: Mann-Whitney; equals ``sklearn.metrics.roc_auc_score``.

    Example:
        >>> auroc([[0.1, 0.3], [0.4, 0.3], [0.35, 0.3], [0.8, 0.3]], [[0, 1], [0, 0], [1, 1], [1, 0]])
        array([0.75, 0.5 ])
    """
    return _of_each_class(_auroc, scores, targets)[..., 0]


def average_precision(scores: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the average precision (AUPRC) of each class: the mean precision at its positives.

    It is nan for a class without positive samples.

    Source: equals ``sklearn.metrics.average_precision_score``.
    """
    return _of_each_class(_average_precision, scores, targets)[..., 0]


def auroc_and_average_precision(scores: ArrayLike, targets: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return :func:`auroc` and :func:`average_precision` at the cost of one of them."""
    values = _of_each_class(lambda at: (_auroc(at), _average_precision(at)), scores, targets)
    return values[..., 0], values[..., 1]


def f1_thresholds(scores: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the score of each class at which "score >= threshold" has the best F1; the highest of several.

    It is 0.5 (our choice: the middle of probabilities) for a class without positive samples.

    Source: DALE-CT IV-B: thresholds are optimized on the validation set.

    Example:
        >>> f1_thresholds([[0.1, 0.2], [0.4, 0.2], [0.35, 0.9], [0.8, 0.9]], [[0, 0], [0, 0], [1, 0], [1, 0]])
        array([0.35, 0.5 ])
    """
    return _of_each_class(_f1_threshold, scores, targets)[..., 0]


def f1(scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike) -> FloatArray:
    """Return the F1 of each class for the prediction "score >= threshold".

    It is nan for a class without positive samples.

    Source: equals ``sklearn.metrics.f1_score`` on each class.

    Example:
        >>> f1([[0.1], [0.4], [0.35], [0.8]], [[0], [0], [1], [1]], thresholds=[0.35]).round(4)
        array([0.8])
    """
    hits, num_predicted, num_positive, _ = _confusion(scores, targets, thresholds)
    return np.where(num_positive > 0, ratio(2 * hits, num_predicted + num_positive), np.nan)


def balanced_accuracy(scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike) -> FloatArray:
    """Return the mean of sensitivity and specificity of each class for the prediction "score >= threshold".

    It is nan for a class that lacks positive or negative samples.

    Source: equals ``sklearn.metrics.balanced_accuracy_score`` on each class.
    """
    hits, num_predicted, num_positive, num_negative = _confusion(scores, targets, thresholds)
    specificity = 1 - ratio(num_predicted - hits, num_negative)
    return (ratio(hits, num_positive) + specificity) / 2


def multilabel_report(
    scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike, names: Sequence[str]
) -> MultilabelReport:
    """Return AUROC, AUPRC, F1 and balanced accuracy of one probe as macro means and by class.

    Source: DALE-CT IV-B, the four metrics of Tables III and IV.
    """
    of_ranking = auroc_and_average_precision(scores, targets)
    metrics = {
        "auroc": of_ranking[0],
        "auprc": of_ranking[1],
        "f1": f1(scores, targets, thresholds),
        "balanced_accuracy": balanced_accuracy(scores, targets, thresholds),
    }
    means = {metric: macro(values, names) for metric, values in metrics.items()}
    return {
        "macro": {metric: mean for metric, (mean, _) in means.items()},
        "undefined": {metric: undefined for metric, (_, undefined) in means.items()},
        "per_class": {
            name: {metric: float(values[index]) for metric, values in metrics.items()}
            for index, name in enumerate(names)
        },
    }


def macro(values: ArrayLike, names: Sequence[str]) -> tuple[float, list[str]]:
    """Return the mean over the classes where a metric is defined, and the names of the other classes.

    Values are ``(C,)``, nan where undefined; so is the mean if no class is defined.

    Raises:
        ValueError: if there are not as many names as values.

    Example:
        >>> macro([0.5, float("nan"), 1.0], ["Emphysema", "Hiatal hernia", "Consolidation"])
        (0.75, ['Hiatal hernia'])
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (len(names),):
        raise ValueError(f"values must have shape ({len(names)},) as there are names, got {array.shape}.")
    defined = ~np.isnan(array)
    undefined = [name for name, known in zip(names, defined, strict=True) if not known]
    return (float(array[defined].mean()) if defined.any() else float("nan")), undefined


def ratio(numerator: FloatArray, denominator: ArrayLike) -> FloatArray:
    """Divide element by element; nan where the denominator is 0."""
    below = np.asarray(denominator, dtype=np.float64)
    out = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, below, out=out, where=below > 0)
    return out


class Reliability(NamedTuple):
    """Bins of samples in the order of their probability, each ``(M,)``."""

    predicted: FloatArray  # mean probability
    positives: IntArray
    counts: IntArray  # all samples

    @property
    def observed(self) -> FloatArray:
        """Share of positives."""
        share: FloatArray = self.positives / self.counts
        return share


def reliability(probabilities: ArrayLike, targets: ArrayLike, num_bins: int = 10) -> Reliability:
    """Group samples into bins of equal size by probability, to compare what was predicted with what occurred.

    Source: the reliability diagram. Bins of equal size are our choice: rare findings have most of their
    probabilities near 0.

    Args:
        probabilities: probabilities of one class, ``(N,)``.
        targets: 0 or 1, ``(N,)``.
        num_bins: M, or the number of samples if that is smaller.

    Raises:
        ValueError: if there is no sample or the shapes differ.

    Example:
        >>> reliability([0.1, 0.2, 0.7, 0.8], [0, 0, 1, 0], num_bins=2)
        Reliability(predicted=array([0.15, 0.75]), positives=array([0, 1]), counts=array([2, 2]))
    """
    probability, target = np.asarray(probabilities, np.float64), np.asarray(targets, np.int64)
    if probability.ndim != 1 or probability.shape != target.shape or not len(target):
        raise ValueError(
            f"probabilities and targets must have one shape (N,) with samples, got {probability.shape} and "
            f"{target.shape}."
        )
    bins = np.array_split(np.argsort(probability, kind="stable"), min(num_bins, len(target)))
    return Reliability(
        np.array([probability[members].mean() for members in bins]),
        np.array([target[members].sum() for members in bins]),
        np.array([len(members) for members in bins]),
    )


def expected_calibration_error(bins: Reliability) -> float:
    """Return the mean distance between predicted and observed shares, weighted by samples per bin."""
    return float(np.average(np.abs(bins.predicted - bins.observed), weights=bins.counts))


class _Positives(NamedTuple):
    """The positives of one class in ascending order of score, and how the class's samples lie around each."""

    scores: FloatArray
    hits: IntArray  # positives of at least its score
    false_alarms: IntArray  # negatives of at least its score
    beaten_twice: IntArray  # negatives below it, each counted twice, and those of its score, each once
    num_negative: int


def _auroc(at: _Positives) -> float:
    pairs = len(at.scores) * at.num_negative
    return int(at.beaten_twice.sum()) / 2 / pairs if pairs else float("nan")


def _average_precision(at: _Positives) -> float:
    return float((at.hits / (at.hits + at.false_alarms)).mean()) if len(at.scores) else float("nan")


def _f1_threshold(at: _Positives) -> float:
    if not len(at.scores):
        return 0.5
    # a threshold between two positives has the hits of the upper one and more false alarms
    values = 2 * at.hits / (at.hits + at.false_alarms + len(at.scores))
    return float(at.scores[::-1][values[::-1].argmax()])


def _of_each_class(
    metrics: Callable[[_Positives], float | tuple[float, float]], scores: ArrayLike, targets: ArrayLike
) -> FloatArray:
    """Measure every class of every probe; the last axis of the output is the metrics."""
    score, target = _checked(scores, targets)
    is_positive = np.ascontiguousarray(target.T) == 1
    columns = np.ascontiguousarray(np.moveaxis(score, -2, -1))
    places = list(np.ndindex(columns.shape[:-1]))
    values = [metrics(_around_positives(columns[place], is_positive[place[-1]])) for place in places]
    return np.reshape(np.array(values, dtype=np.float64), (*columns.shape[:-1], -1 if places else 1))


def _around_positives(scores: FloatArray, is_positive: NDArray[np.bool_]) -> _Positives:
    """Two sorts of plain numbers and a search of one in the other: no order of samples is ever made."""
    positive, negative = np.sort(scores[is_positive]), np.sort(scores[~is_positive])
    below = np.searchsorted(negative, positive, "left")
    not_above = below.copy()
    if len(negative):
        tied = negative[np.minimum(below, len(negative) - 1)] == positive
        not_above[tied] = np.searchsorted(negative, positive[tied], "right")
    first = np.arange(len(positive))
    if (positive[1:] == positive[:-1]).any():
        first = np.searchsorted(positive, positive, "left")
    return _Positives(
        positive, len(positive) - first, len(negative) - below, below + not_above, len(negative)
    )


def _confusion(
    scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return true positives, predicted positives, positives and negatives of each class."""
    score, target = _checked(scores, targets)
    threshold = np.asarray(thresholds, dtype=np.float64)
    expected = score.shape[:-2] + score.shape[-1:]
    if threshold.shape != expected:
        raise ValueError(f"thresholds must have shape {expected} to fit the scores, got {threshold.shape}.")
    if np.isnan(threshold).any():
        label = np.argwhere(np.isnan(threshold))[0, -1]
        raise ValueError(f"thresholds must not be nan, got nan for class {label}.")
    predicted = (score >= threshold[..., None, :]).astype(np.float64)
    num_positive = target.sum(-2)
    return (predicted * target).sum(-2), predicted.sum(-2), num_positive, len(target) - num_positive


def _checked(scores: ArrayLike, targets: ArrayLike) -> tuple[FloatArray, FloatArray]:
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if target.ndim != 2 or target.size == 0:
        raise ValueError(f"targets must have shape (N, C) with samples, got {target.shape}.")
    if score.shape[-2:] != target.shape:
        rule = f"scores must have shape (..., N, C) with (N, C) = {target.shape} as the targets"
        raise ValueError(f"{rule}, got {score.shape}.")
    if np.isnan(score).any():
        sample, label = np.argwhere(np.isnan(score))[0, -2:]
        raise ValueError(f"scores must not be nan, got nan for sample {sample}, class {label}.")
    unclear = (target != 0) & (target != 1)
    if unclear.any():
        sample, label = np.argwhere(unclear)[0]
        value = target[sample, label]
        raise ValueError(f"targets must be 0 or 1, got {value} for sample {sample}, class {label}.")
    return score, target
