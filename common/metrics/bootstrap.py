"""Bootstrap intervals and paired differences: every class is sorted once, a resample is a set of weights.

Resamples draw whole groups such as patients. Where one leaves a metric undefined, its value is nan.
"""

# R resamples, N samples, G groups, C classes, K distinct scores of a class's positives

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix

from common.cohort.cohort import natural_order, patient_of
from common.metrics.multilabel import ratio

FloatArray = NDArray[np.float64]
Weights = NDArray[np.floating[Any]]

RESAMPLING_SEED = 0  # the same in every evaluation, so that all encoders are measured on the same resamples
RESAMPLES_PER_CHUNK = 250  # bounds memory, changes no number


class Difference(NamedTuple):
    """One model's metric less another's, on the same samples and resamples, with its 95 % interval and p."""

    difference: float
    low: float
    high: float
    p: float


class IntervalReport(TypedDict):
    """95 % intervals (low, high), laid out like the report of the metrics themselves."""

    macro: dict[str, tuple[float, float]]
    per_class: dict[str, dict[str, tuple[float, float]]]


class _Sums(NamedTuple):
    """Matrices that turn the weights of groups into sums for one class's ranking, best scores first."""

    called: NDArray[Any] | csr_matrix  # (K, G): samples from just below the next higher positive down to it
    positive: NDArray[Any] | csr_matrix  # (K, G): positives among them
    tied: NDArray[Any] | csr_matrix  # (K, G): negatives that tie with these positives
    samples: NDArray[Any]  # (G,): all samples


def groups_of(volumes: Sequence[str], resampling: str) -> list[str]:
    """Name the group of each volume, which a resample draws or leaves out as a whole.

    ``resampling`` is "patients", as in the paper's protocol, or "volumes" for data without patient names.

    Raises:
        ValueError: if the resampling is neither, or a volume's name does not contain its patient.
    """
    if resampling not in ("patients", "volumes"):
        raise ValueError(f"resampling must be 'patients' or 'volumes', got {resampling!r}.")
    return [patient_of(volume) if resampling == "patients" else volume for volume in volumes]


def resample_weights(groups: Sequence[str], num_resamples: int, seed: int) -> NDArray[np.float32]:
    """Draw resamples of whole groups with replacement: how often each sample is in each resample.

    The draw depends only on the set of groups, the number of resamples and the seed. Models measured on the
    same volumes are therefore measured on the same resamples, whatever the order of the volumes.

    Returns:
        Counts, float32 ``(R, N)``.

    Raises:
        ValueError: if there is no sample or no resample.
    """
    if num_resamples < 1 or not groups:
        raise ValueError(
            f"num_resamples and the number of samples must be at least 1, got {num_resamples} and "
            f"{len(groups)}."
        )
    distinct = sorted(set(groups), key=natural_order)
    place = {group: index for index, group in enumerate(distinct)}
    draws = np.random.default_rng(seed).integers(0, len(distinct), (num_resamples, len(distinct)))
    counts = np.stack([np.bincount(draw, minlength=len(distinct)) for draw in draws])
    return counts[:, [place[group] for group in groups]].astype(np.float32)


def bootstrap(
    scores: ArrayLike, targets: ArrayLike, thresholds: ArrayLike, weights: ArrayLike
) -> dict[str, FloatArray]:
    """Return the metrics of :func:`common.metrics.multilabel.multilabel_report` on every resample.

    Source: each value equals scikit-learn's on the resample written out.

    Args:
        scores: scores ``(N, C)``, higher means more likely.
        targets: 0 or 1, ``(N, C)``.
        thresholds: one per class, ``(C,)``.
        weights: how often each sample is in each resample, ``(R, N)``, from :func:`resample_weights`.

    Returns:
        ``auroc``, ``auprc``, ``f1`` and ``balanced_accuracy``, each ``(R, C)``.

    Raises:
        ValueError: if shapes do not agree or a score is nan.
    """
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float32)  # whole numbers: their sums are exact to 2 ** 24
    if score.ndim != 2 or score.shape != target.shape or weight.shape[1:] != score.shape[:1]:
        raise ValueError(
            f"scores, targets and weights must have shapes (N, C), (N, C) and (R, N), got {score.shape}, "
            f"{target.shape} and {weight.shape}."
        )
    threshold = np.asarray(thresholds, dtype=np.float64)
    values = _decisions((score >= threshold).astype(np.float32), target.astype(np.float32), weight)
    values |= {name: np.full(values["f1"].shape, np.nan) for name in ("auroc", "auprc")}
    each_sample = np.arange(len(score))
    for label in range(score.shape[1]):
        areas = resampled_areas(score[:, label], target[:, label], each_sample, weight)
        values["auroc"][:, label], values["auprc"][:, label] = areas
    return values


def resampled_areas(
    scores: ArrayLike, targets: ArrayLike, groups: ArrayLike, weights: Weights, max_levels: int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return AUROC and AUPRC of one class on every resample of whole groups.

    Source: equals ``sklearn.metrics`` with the weight of its group as the weight of each sample.

    Args:
        scores: scores ``(N,)``, higher means more likely.
        targets: 0 or 1, ``(N,)``.
        groups: number of each sample's group, ``(N,)``.
        weights: how often each group is in each resample, ``(R, G)``. Sums are as exact as their type:
            float32 to 2 ** 24 samples, float64 beyond.
        max_levels: with more distinct scores of positives than this, neighbouring ones count as tied; None
            for no limit. With 4,096 the areas are off by less than 1e-3.

    Returns:
        Both ``(R,)``; nan where a resample lacks positives, for AUROC also negatives.

    Raises:
        ValueError: if shapes do not agree or a score is nan.

    Example:
        >>> weights = np.array([[1.0, 1.0], [2.0, 0.0]])
        >>> auroc, auprc = resampled_areas([0.9, 0.8, 0.8, 0.1], [1, 0, 1, 0], [0, 0, 1, 1], weights)
        >>> auroc.tolist(), auprc.round(3).tolist()
        ([0.875, 1.0], [0.833, 1.0])
    """
    score, target, group = np.asarray(scores), np.asarray(targets) == 1, np.asarray(groups)
    if not score.shape == target.shape == group.shape or score.ndim != 1:
        raise ValueError(
            f"scores, targets and groups must have one shape (N,), got {score.shape}, {target.shape} and "
            f"{group.shape}."
        )
    if np.isnan(score).any():
        raise ValueError(f"scores must not be nan, got nan for sample {int(np.isnan(score).argmax())}.")
    auroc, auprc = np.full((2, len(weights)), np.nan)
    if target.any():
        sums = _sums(score, target, group, weights, max_levels)
        for first in range(0, len(weights), RESAMPLES_PER_CHUNK):
            rows = slice(first, first + RESAMPLES_PER_CHUNK)
            auroc[rows], auprc[rows] = _areas(sums, np.ascontiguousarray(weights[rows].T))
    return auroc, auprc


def macro_means(values: ArrayLike) -> FloatArray:
    """Return the mean of a metric ``(R, C)`` over the classes that a resample defines, ``(R,)``."""
    array = np.asarray(values, dtype=np.float64)
    return ratio(np.nansum(array, -1), (~np.isnan(array)).sum(-1))


def interval(values: ArrayLike) -> tuple[float, float]:
    """Return the 95 % percentile interval over resamples ``(R,)`` in which a metric is defined."""
    array = np.asarray(values, dtype=np.float64)
    defined = array[~np.isnan(array)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def interval_report(values: dict[str, FloatArray], names: Sequence[str]) -> IntervalReport:
    """Return the intervals of what :func:`bootstrap` returned, laid out like the report of the metrics."""
    return {
        "macro": {metric: interval(macro_means(of_metric)) for metric, of_metric in values.items()},
        "per_class": {
            name: {metric: interval(of_metric[:, index]) for metric, of_metric in values.items()}
            for index, name in enumerate(names)
        },
    }


def paired_difference(one: ArrayLike, other: ArrayLike) -> Difference:
    """Compare a metric of two models that were measured on the same samples and the same resamples.

    Both are ``(1 + R,)``: the metric on all samples, then on each resample.
    """
    value, *resampled = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return Difference(float(value), *interval(resampled), two_sided_p(resampled))


def two_sided_p(differences: ArrayLike) -> float:
    """Return the p-value of a difference from its resamples ``(R,)``: twice the share on the smaller side.

    Source: the achieved significance level of the percentile bootstrap, (1 + count) / (1 + R) on each side as
    in Davison and Hinkley (1997), eq. 4.11, so that no finite number of resamples gives 0.

    Example:
        >>> two_sided_p([0.1] * 99), two_sided_p([-0.1, 0.1] * 50)
        (0.02, 1.0)
    """
    array = np.asarray(differences, dtype=np.float64)
    defined = array[~np.isnan(array)]
    if not len(defined):
        return float("nan")
    smaller = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (1 + smaller) / (1 + len(defined)))


def _decisions(
    predicted: NDArray[np.float32], target: NDArray[np.float32], weight: NDArray[np.float32]
) -> dict[str, FloatArray]:
    hits, called, positive = (
        (weight @ matrix).astype(np.float64) for matrix in (predicted * target, predicted, target)
    )
    negative = weight.sum(1, dtype=np.float64)[:, None] - positive
    f1 = np.where(positive > 0, ratio(2 * hits, called + positive), np.nan)
    specificity = 1 - ratio(called - hits, negative)
    return {"f1": f1, "balanced_accuracy": (ratio(hits, positive) + specificity) / 2}


def _sums(
    scores: NDArray[Any], is_positive: NDArray[Any], groups: NDArray[Any], weights: Weights, most: int | None
) -> _Sums:
    """Cut a class's samples into runs that end at each distinct score of a positive, highest first."""
    levels = np.unique(scores[is_positive])
    is_merged = False
    if most is not None and len(levels) > most:
        is_merged, levels = True, levels[np.linspace(0, len(levels) - 1, most).round().astype(np.intp)]
    levels = levels[::-1]
    level = np.searchsorted(-levels, -scores, "left")  # the highest level that a sample reaches
    reaches = level < len(levels)
    is_tied = reaches & ~is_positive
    if not is_merged:
        is_tied &= scores == levels[np.minimum(level, len(levels) - 1)]
    shape, dtype = (len(levels), weights.shape[1]), weights.dtype

    def counts(chosen: NDArray[Any]) -> NDArray[Any] | csr_matrix:
        row, column = level[chosen], groups[chosen]
        if 8 * len(row) < shape[0] * shape[1]:
            return csr_matrix((np.ones(len(row), dtype), (row, column)), shape=shape)
        dense = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1])
        return dense.reshape(shape).astype(dtype)

    samples = np.bincount(groups, minlength=shape[1]).astype(dtype)
    return _Sums(counts(reaches), counts(is_positive), counts(is_tied), samples)


def _areas(sums: _Sums, weight: Weights) -> tuple[FloatArray, FloatArray]:
    """AUROC and AUPRC of one class; weight (G, resamples)."""
    positive = sums.positive @ weight
    hits = positive.cumsum(0)
    called = (sums.called @ weight).cumsum(0)
    num_positive = hits[-1].astype(np.float64)
    num_negative = sums.samples @ weight - num_positive
    precision = np.divide(hits, called, out=np.zeros(hits.shape), where=called > 0, dtype=np.float64)
    beaten = num_negative - (called - hits) + (sums.tied @ weight) / 2
    auroc = ratio(np.einsum("kr,kr->r", positive, beaten), num_positive * num_negative)
    return auroc, ratio(np.einsum("kr,kr->r", positive, precision), num_positive)
