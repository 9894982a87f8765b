"""Bootstrap of the multilabel metrics: every class is sorted once, a resample is a weight of each sample."""

# R resamples, N samples, C classes, K distinct scores of a class's positives

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix

from common.cohort.patient_split import natural_order, patient_of

FloatArray = NDArray[np.float64]

RESAMPLING_SEED = 0  # of every evaluation, so that all encoders are measured on the same resamples
RESAMPLES_PER_CHUNK = 250  # bounds memory, changes no number


class _Sums(NamedTuple):
    """Of one class, as matrices that add up the weights of samples."""

    called: csr_matrix  # (K, N): samples from just below the next higher positive down to it
    positive: csr_matrix  # (K, N): positives of that score
    tied: csr_matrix  # (K, N): negatives of that score


def groups_of(volumes: Sequence[str], resampling: str) -> list[str]:
    """Return what a resample draws or leaves as a whole.

    Args:
        volumes: names of the volumes.
        resampling: "patients", as in the paper's protocol, or "volumes", for data without a patient's name.

    Raises:
        ValueError: if the resampling is neither, or a volume's name does not tell its patient.

    Example:
        >>> groups_of(["valid_1_a_1", "valid_1_b_1"], "patients")
        ['valid_1', 'valid_1']
    """
    if resampling not in ("patients", "volumes"):
        raise ValueError(f"resampling must be 'patients' or 'volumes', got {resampling!r}.")
    return [patient_of(volume) if resampling == "patients" else volume for volume in volumes]


def resample_weights(groups: Sequence[str], num_resamples: int, seed: int) -> NDArray[np.float32]:
    """Draw resamples of whole groups with replacement: how often each sample stands in each resample.

    The draw depends on the set of groups, their number of resamples and the seed alone, so that models that
    are measured on the same volumes are measured on the same resamples, in whatever order the volumes come.

    Args:
        groups: group of each sample: its patient, or its own name to resample single samples.
        num_resamples: R.
        seed: seed of the draws.

    Returns:
        float32 ``(R, N)``.

    Raises:
        ValueError: if there is no sample or no resample.

    Example:
        >>> resample_weights(["train_1", "train_1", "train_2"], num_resamples=2, seed=0)
        array([[0., 0., 2.],
               [1., 1., 1.]], dtype=float32)
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
        scores: higher means more likely.
        targets: 0 or 1.
        thresholds: of each class.
        weights: times each sample stands in each resample, of :func:`resample_weights`.

    Shape:
        scores and targets ``(N, C)``, thresholds ``(C,)``, weights ``(R, N)``. Output: ``auroc``, ``auprc``,
        ``f1`` and ``balanced_accuracy``, each ``(R, C)``; nan where a resample leaves a class undefined.

    Raises:
        ValueError: if shapes do not agree.
    """
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    weight = np.asarray(weights, dtype=np.float32)  # whole numbers: their sums are exact to 2 ** 24
    if score.ndim != 2 or score.shape != target.shape or weight.shape[1:] != score.shape[:1]:
        raise ValueError(
            f"scores, targets and weights must have shapes (N, C), (N, C) and (R, N), got {score.shape}, "
            f"{target.shape} and {weight.shape}."
        )
    threshold = np.asarray(thresholds, dtype=np.float64)
    values = _of_decisions((score >= threshold).astype(np.float32), target.astype(np.float32), weight)
    values |= {name: np.full(values["f1"].shape, np.nan) for name in ("auroc", "auprc")}
    for label in np.flatnonzero(target.any(0)):
        sums = _sums(score[:, label], target[:, label] == 1)
        for first in range(0, len(weight), RESAMPLES_PER_CHUNK):
            rows = slice(first, first + RESAMPLES_PER_CHUNK)
            of_rankings = _of_rankings(sums, np.ascontiguousarray(weight[rows].T))
            values["auroc"][rows, label], values["auprc"][rows, label] = of_rankings
    return values


def macro_means(values: ArrayLike) -> FloatArray:
    """Return the mean over the classes that a resample defines, nan if it defines none.

    Args:
        values: a metric by resample and class.

    Shape:
        values ``(R, C)``. Output: ``(R,)``.

    Example:
        >>> macro_means([[0.5, 0.7], [0.5, float("nan")]])
        array([0.6, 0.5])
    """
    array = np.asarray(values, dtype=np.float64)
    return _ratio(np.nansum(array, -1), (~np.isnan(array)).sum(-1))


def interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval over the resamples in which a metric is defined.

    Args:
        values: the metric of each resample.
        confidence: share of the resamples inside; our choice: 95 %.

    Shape:
        values ``(R,)``. Output: low and high, nan if no resample defines the metric.

    Example:
        >>> interval(range(101), confidence=0.9)
        (5.0, 95.0)
    """
    array = np.asarray(values, dtype=np.float64)
    defined = array[~np.isnan(array)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def interval_report(values: dict[str, FloatArray], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the intervals of :func:`bootstrap`, laid out as the report of the metrics themselves.

    Args:
        values: metrics by resample and class.
        names: of the classes.

    Returns:
        ``macro[metric]`` and ``per_class[name][metric]``, each (low, high).
    """
    return {
        "macro": {metric: interval(macro_means(of_metric)) for metric, of_metric in values.items()},
        "per_class": {
            name: {metric: interval(of_metric[:, index]) for metric, of_metric in values.items()}
            for index, name in enumerate(names)
        },
    }


def two_sided_p(differences: ArrayLike) -> float:
    """Return how often, at most, resamples would cross zero were there no difference: twice the smaller side.

    Source: the achieved significance level of the percentile bootstrap, (1 + count) / (1 + R) on each side as
    in Davison and Hinkley (1997), eq. 4.11, so that no finite number of resamples gives 0.

    Args:
        differences: of a metric between two models, on each resample.

    Shape:
        differences ``(R,)``. Output: nan if none is defined.

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


def _of_decisions(
    predicted: NDArray[np.float32], target: NDArray[np.float32], weight: NDArray[np.float32]
) -> dict[str, FloatArray]:
    hits, called, positive = (
        (weight @ matrix).astype(np.float64) for matrix in (predicted * target, predicted, target)
    )
    negative = weight.sum(1, dtype=np.float64)[:, None] - positive
    f1 = np.where(positive > 0, _ratio(2 * hits, called + positive), np.nan)
    specificity = 1 - _ratio(called - hits, negative)
    return {"f1": f1, "balanced_accuracy": (_ratio(hits, positive) + specificity) / 2}


def _sums(scores: FloatArray, is_positive: NDArray[np.bool_]) -> _Sums:
    """Cut a class's samples into runs that end at each distinct score of a positive, highest first."""
    levels = np.unique(scores[is_positive])[::-1]
    level = np.searchsorted(-levels, -scores, "left")  # the highest positive's score that a sample reaches
    reaches = level < len(levels)
    at_level = reaches & (scores == levels[np.minimum(level, len(levels) - 1)])
    return _Sums(
        *(
            csr_matrix(
                (np.ones(chosen.sum(), np.float32), (level[chosen], np.flatnonzero(chosen))),
                shape=(len(levels), len(scores)),
            )
            for chosen in (reaches, at_level & is_positive, at_level & ~is_positive)
        )
    )


def _of_rankings(sums: _Sums, weight: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """AUROC and AUPRC of one class; weight (N, resamples)."""
    positive = sums.positive @ weight
    hits = positive.cumsum(0)
    called = (sums.called @ weight).cumsum(0)
    num_positive = hits[-1].astype(np.float64)
    num_negative = weight.sum(0) - num_positive
    precision = np.divide(hits, called, out=np.zeros(hits.shape), where=called > 0, dtype=np.float64)
    beaten = num_negative - (called - hits)
    if sums.tied.nnz:
        beaten = beaten + (sums.tied @ weight) / 2
    auroc = _ratio(np.einsum("kr,kr->r", positive, beaten), num_positive * num_negative)
    return auroc, _ratio(np.einsum("kr,kr->r", positive, precision), num_positive)


def _ratio(numerator: FloatArray, denominator: ArrayLike) -> FloatArray:
    """Divide; nan where the denominator is 0."""
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)
