"""How well predicted probabilities agree with what occurs."""

# N samples, M bins

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

Z_95 = 1.959963984540054  # quantile of the normal distribution


class Reliability(NamedTuple):
    """Bins of samples in the order of their probability.

    Attributes:
        predicted: mean probability of each bin ``(M,)``.
        observed: share of positives of each bin ``(M,)``.
        counts: samples of each bin ``(M,)``.
    """

    predicted: FloatArray
    observed: FloatArray
    counts: NDArray[np.int64]


def reliability(probabilities: ArrayLike, targets: ArrayLike, num_bins: int = 10) -> Reliability:
    """Group samples into bins of equal size by probability, to compare what was predicted with what occurred.

    Source: the reliability diagram. Bins of equal size are our choice: rare findings have most of their
    probabilities near 0.

    Args:
        probabilities: probabilities of one class.
        targets: 0 or 1.
        num_bins: M, or the number of samples if that is smaller.

    Shape:
        probabilities and targets ``(N,)``.

    Raises:
        ValueError: if there is no sample or the shapes differ.

    Example:
        >>> reliability([0.1, 0.2, 0.7, 0.8], [0, 0, 1, 0], num_bins=2)
        Reliability(predicted=array([0.15, 0.75]), observed=array([0. , 0.5]), counts=array([2, 2]))
    """
    probability, target = np.asarray(probabilities, np.float64), np.asarray(targets, np.float64)
    if probability.ndim != 1 or probability.shape != target.shape or not len(target):
        raise ValueError(
            f"probabilities and targets must have one shape (N,) with samples, got {probability.shape} and "
            f"{target.shape}."
        )
    bins = np.array_split(np.argsort(probability, kind="stable"), min(num_bins, len(target)))
    return Reliability(
        np.array([probability[members].mean() for members in bins]),
        np.array([target[members].mean() for members in bins]),
        np.array([len(members) for members in bins]),
    )


def expected_calibration_error(bins: Reliability) -> float:
    """Return the mean distance between predicted and observed shares, weighted by samples per bin.

    Args:
        bins: bins from :func:`reliability`.

    Example:
        >>> expected_calibration_error(reliability([0.1, 0.2, 0.7, 0.8], [0, 0, 1, 0], num_bins=2))
        0.2
    """
    return float(np.average(np.abs(bins.predicted - bins.observed), weights=bins.counts))


def brier_score(probabilities: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the mean squared distance between probability and target, per class.

    Args:
        probabilities: from 0 to 1.
        targets: 0 or 1.

    Shape:
        both ``(N, C)``. Output: ``(C,)``.

    Example:
        >>> brier_score([[0.5, 1.0], [0.5, 0.0]], [[0, 1], [1, 0]])
        array([0.25, 0.  ])
    """
    distance = np.asarray(probabilities, np.float64) - np.asarray(targets, np.float64)
    score: FloatArray = np.square(distance).mean(0)
    return score


def wilson_interval(shares: ArrayLike, counts: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the 95 % score interval of shares.

    Source: Wilson (1927).

    Args:
        shares: from 0 to 1.
        counts: number of samples that each is a share of.

    Shape:
        both ``(M,)``. Output: low and high ``(M,)``.

    Example:
        >>> low, high = wilson_interval([0.0], [10])
        >>> low.round(4), high.round(4)
        (array([0.]), array([0.2775]))
    """
    share, count = np.asarray(shares, np.float64), np.asarray(counts, np.float64)
    centre = (share + Z_95**2 / (2 * count)) / (1 + Z_95**2 / count)
    half = Z_95 / (1 + Z_95**2 / count) * np.sqrt(share * (1 - share) / count + Z_95**2 / (4 * count**2))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)
