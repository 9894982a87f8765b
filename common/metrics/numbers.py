"""How well numbers are predicted: R2, mean absolute error and Spearman's correlation, on every resample."""

# N volumes, R resamples

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.metrics.multilabel import ratio

FloatArray = NDArray[np.float64]


def number_metrics(predicted: ArrayLike, truth: ArrayLike, weights: ArrayLike) -> dict[str, FloatArray]:
    """Measure predictions of one number on every resample.

    Source: each value equals scikit-learn's and scipy's on the resample written out.

    Args:
        predicted: ``(N,)``.
        truth: ``(N,)``.
        weights: how often each volume is in each resample, ``(R, N)``.

    Returns:
        ``r2``, ``mae`` in the number's unit, and ``spearman``, each ``(R,)``; nan where they are undefined,
        as for a number that is constant in a resample.
    """
    guess, right = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    weight = np.asarray(weights, np.float64)
    total = weight.sum(1)
    mean = weight @ right / total
    spread = (weight * (right - mean[:, None]) ** 2).sum(1)
    ranks = [_ranks(values, weight) for values in (guess, right)]
    one, other = (values - ((weight * values).sum(1) / total)[:, None] for values in ranks)
    scale = np.sqrt((weight * one**2).sum(1) * (weight * other**2).sum(1))
    return {
        "r2": 1 - ratio(weight @ (guess - right) ** 2, spread),
        "mae": weight @ np.abs(guess - right) / total,
        "spearman": ratio((weight * one * other).sum(1), scale),
    }


def _ranks(values: FloatArray, weight: FloatArray) -> FloatArray:
    """Rank of each value within each resample, ``(R, N)``; equal ones share the mean of their ranks."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    below = np.concatenate([np.zeros((len(weight), 1)), weight[:, order].cumsum(1)], axis=1)
    first, last = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    ranks: FloatArray = (below[:, first] + below[:, last] + 1) / 2
    return ranks
