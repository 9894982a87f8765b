"""Metrics of several binary labels at once; an undefined class is nan and named, never 0."""

# P probes (any leading axes), N samples, C classes

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


class _Ranking(NamedTuple):
    """Samples in descending order of score; samples of equal score form one step."""

    scores: FloatArray
    positive: FloatArray
    step_size: FloatArray  # samples down to the end of a sample's step
    hits: FloatArray  # positives down to the end of a sample's step
    hits_above: FloatArray  # positives above a sample's step


def auroc(scores: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the area under the ROC curve of each class; ties count half.

    Source: Mann-Whitney; equals ``sklearn.metrics.roc_auc_score``.

    Args:
        scores: higher means more likely; any monotone scale.
        targets: 0 or 1.

    Shape:
        scores ``(..., N, C)``, targets ``(N, C)``. Output: ``(..., C)`` float64, nan for a class that lacks
        positive or negative samples.

    Raises:
        ValueError: if shapes do not agree, scores are nan or targets are not 0 or 1.

    Example:
        >>> auroc([[0.1, 0.3], [0.4, 0.3], [0.35, 0.3], [0.8, 0.3]], [[0, 1], [0, 0], [1, 1], [1, 0]])
        array([0.75, 0.5 ])
    """
    ranking, num_positive, num_negative = _ranked(scores, targets)
    beaten = ((1 - ranking.positive) * (ranking.hits + ranking.hits_above) / 2).sum(-2)
    return _ratio(beaten, num_positive * num_negative)


def average_precision(scores: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the average precision (AUPRC) of each class: the mean precision at its positives.

    Source: equals ``sklearn.metrics.average_precision_score``.

    Args:
        scores: higher means more likely; any monotone scale.
        targets: 0 or 1.

    Shape:
        scores ``(..., N, C)``, targets ``(N, C)``. Output: ``(..., C)`` float64, nan for a class without
        positive samples.

    Raises:
        ValueError: if shapes do not agree, scores are nan or targets are not 0 or 1.

    Example:
        >>> average_precision([[0.1], [0.4], [0.35], [0.8]], [[0], [0], [1], [1]]).round(4)
        array([0.8333])
    """
    ranking, num_positive, _ = _ranked(scores, targets)
    return _ratio((ranking.positive * ranking.hits / ranking.step_size).sum(-2), num_positive)


def f1_thresholds(scores: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the score of each class at which "score >= threshold" has the best F1; the highest of several.

    Source: DALE-CT IV-B: thresholds are optimized on the validation set.

    Args:
        scores: of the validation set.
        targets: 0 or 1.

    Shape:
        scores ``(..., N, C)``, targets ``(N, C)``. Output: ``(..., C)`` float64, each one of the scores; 0.5
        (our choice: the middle of probabilities) for a class without positive samples.

    Raises:
        ValueError: if shapes do not agree, scores are nan or targets are not 0 or 1.

    Example:
        >>> f1_thresholds([[0.1, 0.2], [0.4, 0.2], [0.35, 0.9], [0.8, 0.9]], [[0, 0], [0, 0], [1, 0], [1, 0]])
        array([0.35, 0.5 ])
    """
    ranking, num_positive, _ = _ranked(scores, targets)
    values = 2 * ranking.hits / (ranking.step_size + num_positive[..., None, :])
    best = np.take_along_axis(ranking.scores, values.argmax(-2, keepdims=True), -2).squeeze(-2)
    return np.where(num_positive > 0, best, 0.5)


def f1(scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike) -> FloatArray:
    """Return the F1 of each class for the prediction "score >= threshold".

    Source: equals ``sklearn.metrics.f1_score`` on each class.

    Args:
        scores: higher means more likely.
        targets: 0 or 1.
        thresholds: of each class.

    Shape:
        scores ``(..., N, C)``, targets ``(N, C)``, thresholds ``(..., C)``. Output: ``(..., C)`` float64, nan
        for a class without positive samples.

    Raises:
        ValueError: if shapes do not agree, scores or thresholds are nan or targets are not 0 or 1.

    Example:
        >>> f1([[0.1], [0.4], [0.35], [0.8]], [[0], [0], [1], [1]], thresholds=[0.35]).round(4)
        array([0.8])
    """
    hits, num_predicted, num_positive, _ = _confusion(scores, targets, thresholds)
    return np.where(num_positive > 0, _ratio(2 * hits, num_predicted + num_positive), np.nan)


def balanced_accuracy(scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike) -> FloatArray:
    """Return the mean of sensitivity and specificity of each class for the prediction "score >= threshold".

    Source: equals ``sklearn.metrics.balanced_accuracy_score`` on each class.

    Args:
        scores: higher means more likely.
        targets: 0 or 1.
        thresholds: of each class.

    Shape:
        scores ``(..., N, C)``, targets ``(N, C)``, thresholds ``(..., C)``. Output: ``(..., C)`` float64, nan
        for a class that lacks positive or negative samples.

    Raises:
        ValueError: if shapes do not agree, scores or thresholds are nan or targets are not 0 or 1.

    Example:
        >>> balanced_accuracy([[0.1], [0.4], [0.35], [0.8]], [[0], [0], [1], [1]], thresholds=[0.35])
        array([0.75])
    """
    hits, num_predicted, num_positive, num_negative = _confusion(scores, targets, thresholds)
    specificity = 1 - _ratio(num_predicted - hits, num_negative)
    return (_ratio(hits, num_positive) + specificity) / 2


def macro(values: ArrayLike, names: Sequence[str]) -> tuple[float, list[str]]:
    """Return the mean over the classes where a metric is defined, and the names of the other classes.

    Args:
        values: the metric of each class, nan where undefined.
        names: of the classes.

    Shape:
        values ``(C,)``. Output: a float, nan if no class is defined, and a list.

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


def multilabel_report(
    scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return AUROC, AUPRC, F1 and balanced accuracy as macro means and by class.

    Source: DALE-CT IV-B, the four metrics of Tables III and IV.

    Args:
        scores: higher means more likely.
        targets: 0 or 1.
        thresholds: of each class, from the validation set.
        names: of the classes.

    Shape:
        scores and targets ``(N, C)``, thresholds ``(C,)``. Output: ``macro[metric]`` a float over the defined
        classes, ``undefined[metric]`` the names of the others, ``per_class[name][metric]`` a float, nan where
        undefined; the metrics are ``auroc``, ``auprc``, ``f1`` and ``balanced_accuracy``.

    Raises:
        ValueError: if shapes do not agree, scores or thresholds are nan or targets are not 0 or 1.

    Example:
        >>> names = ["Emphysema", "Nodule"]
        >>> report = multilabel_report([[0.1, 0.2], [0.8, 0.3]], [[0, 0], [1, 0]], [0.5, 0.5], names)
        >>> report["macro"]
        {'auroc': 1.0, 'auprc': 1.0, 'f1': 1.0, 'balanced_accuracy': 1.0}
        >>> report["undefined"]["auroc"]
        ['Nodule']
        >>> report["per_class"]["Nodule"]["auroc"]
        nan
    """
    metrics = {
        "auroc": auroc(scores, targets),
        "auprc": average_precision(scores, targets),
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


def _ranked(scores: ArrayLike, targets: ArrayLike) -> tuple[_Ranking, FloatArray, FloatArray]:
    """Return the ranking of each class and its numbers of positives and of negatives."""
    score, target = _checked(scores, targets)
    order = np.argsort(-score, axis=-2, kind="stable")
    score = np.take_along_axis(score, order, -2)
    positive = np.take_along_axis(np.broadcast_to(target, score.shape), order, -2)
    changes = score[..., 1:, :] != score[..., :-1, :]
    always = np.ones_like(score[..., :1, :], dtype=bool)
    position = np.arange(score.shape[-2])[:, None]
    first = np.maximum.accumulate(np.where(np.concatenate([always, changes], -2), position, 0), -2)
    ends = np.where(np.concatenate([changes, always], -2), position, score.shape[-2])
    last = np.flip(np.minimum.accumulate(np.flip(ends, -2), -2), -2)
    hits = positive.cumsum(-2)
    ranking = _Ranking(
        scores=score,
        positive=positive,
        step_size=last + 1.0,
        hits=np.take_along_axis(hits, last, -2),
        hits_above=np.take_along_axis(hits - positive, first, -2),
    )
    num_positive = target.sum(-2)
    return ranking, num_positive, len(target) - num_positive


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


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide; nan where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)
