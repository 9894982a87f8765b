"""Ridge regression from slice embeddings by moments, so that volumes are read one by one and not kept."""

# S slices, D embedding, T targets

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.metrics.multilabel import ratio

FloatArray = NDArray[np.float64]

PENALTIES = tuple(float(value) for value in np.logspace(-7, 1, 17))
"""Ridge penalties tried, relative to the features' mean variance. Our choice; upstream: 13, six decades."""


class Moments(NamedTuple):
    """Sums over slices that a ridge regression needs, with a column of ones before the features.

    Args:
        features: ``(1 + D, 1 + D)``.
        targets: ``(1 + D, T)``.
    """

    features: FloatArray
    targets: FloatArray

    def __add__(self, other: object) -> "Moments":
        """Return the moments of both sets of slices."""
        assert isinstance(other, Moments)
        return Moments(self.features + other.features, self.targets + other.targets)


def moments(embeddings: ArrayLike, targets: ArrayLike) -> Moments:
    """Return the moments of a volume's slices, from embeddings ``(S, D)`` and targets ``(S, T)``.

    Raises:
        ValueError: if there are not as many targets as slices.
    """
    tokens, target = np.asarray(embeddings, np.float64), np.asarray(targets, np.float64)
    if tokens.ndim != 2 or target.ndim != 2 or len(tokens) != len(target):
        raise ValueError(
            f"embeddings and targets must have shapes (S, D) and (S, T), got {tokens.shape} and "
            f"{target.shape}."
        )
    tokens = np.concatenate([np.ones((len(tokens), 1)), tokens], axis=1)
    return Moments(tokens.T @ tokens, tokens.T @ target)


def ridge(of: Moments, penalties: ArrayLike = PENALTIES) -> FloatArray:
    """Fit once per penalty. The fit centres the features, and does not penalise the constant.

    Args:
        of: moments of the training slices.
        penalties: penalties relative to the mean variance of the features.

    Returns:
        Fits ``(len(penalties), 1 + D, T)``, the constant first.

    Example:
        >>> line = moments([[0.0], [1.0], [2.0]], [[1.0], [3.0], [5.0]])
        >>> ridge(line, [0.0]).round(6).ravel().tolist()
        [1.0, 2.0]
    """
    count = of.features[0, 0]
    mean, target_mean = of.features[0, 1:] / count, of.targets[0] / count
    covariance = of.features[1:, 1:] / count - np.outer(mean, mean)
    cross = of.targets[1:] / count - np.outer(mean, target_mean)
    values, vectors = np.linalg.eigh(covariance)
    values = values.clip(min=0)
    rotated, scale = vectors.T @ cross, values.mean()
    fits = []
    for penalty in np.asarray(penalties, np.float64):
        shrunk = values + penalty * scale
        floor = 1e-12 * values.max()  # directions in which nothing varies carry no weight
        inverse = np.divide(1, shrunk, out=np.zeros_like(shrunk), where=shrunk > floor)
        weights = vectors @ (inverse[:, None] * rotated)
        fits.append(np.concatenate([[target_mean - mean @ weights], weights]))
    return np.stack(fits)


def read_out(fit: ArrayLike, embeddings: ArrayLike) -> FloatArray:
    """Apply fits of :func:`ridge` ``(..., 1 + D, T)`` to embeddings ``(S, D)``: ``(..., S, T)``."""
    weights = np.asarray(fit, np.float64)
    predicted: FloatArray = np.asarray(embeddings, np.float64) @ weights[..., 1:, :] + weights[..., :1, :]
    return predicted


def r_squared(predicted: ArrayLike, targets: ArrayLike) -> FloatArray:
    """Return the share of each target's variance that predictions ``(S, T)`` explain, nan if it is constant.

    Source: equals ``sklearn.metrics.r2_score``.
    """
    target = np.asarray(targets, np.float64)
    residual = ((np.asarray(predicted, np.float64) - target) ** 2).sum(0)
    return 1 - ratio(residual, ((target - target.mean(0)) ** 2).sum(0))
