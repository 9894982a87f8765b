"""How many directions embeddings use, with errors from leaving patients out."""

# N embeddings, D embedding, J groups of patients

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


def participation_ratio(covariance: ArrayLike) -> float:
    """Return (sum of the eigenvalues)^2 over the sum of their squares: 1 on a line, D where all are equal.

    Source: DALE-CT's released world-model probes, P0.

    Args:
        covariance: of the embeddings.

    Shape:
        ``(D, D)``. Output: nan where nothing varies.

    Example:
        >>> participation_ratio(np.diag([2.0, 2.0, 0.0]))
        2.0
    """
    matrix = np.asarray(covariance, np.float64)
    squares = (matrix**2).sum()  # of a symmetric matrix the sum of the squared eigenvalues
    return float(np.trace(matrix) ** 2 / squares) if squares > 0 else float("nan")


def spectral_effective_rank(covariance: ArrayLike) -> float:
    """Return exp(entropy) of the normalized singular values of the embeddings that have this covariance.

    Source: Roy and Vetterli 2007, as :func:`common.metrics.effective_rank.effective_rank`.

    Args:
        covariance: of the embeddings.

    Shape:
        ``(D, D)``. Output: nan where nothing varies.

    Example:
        >>> round(spectral_effective_rank(np.diag([4.0, 4.0, 4.0])), 6)
        3.0
    """
    values = np.sqrt(np.linalg.eigvalsh(np.asarray(covariance, np.float64)).clip(min=0))
    values = values[values > 1e-9 * values.max()]
    shares = values / values.sum() if len(values) else values
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(values) else float("nan")


def covariance_of(sums: Sequence[FloatArray]) -> FloatArray:
    """Return the covariance from sums over embeddings with ones before them, ``(1 + D, 1 + D)`` each.

    Args:
        sums: of parts of the embeddings, the ``features`` of :class:`common.metrics.linear_readout.Moments`.
    """
    total = np.sum(sums, axis=0)
    mean = total[0, 1:] / total[0, 0]
    covariance: FloatArray = total[1:, 1:] / total[0, 0] - np.outer(mean, mean)
    return covariance


def jackknife(
    sums: Sequence[FloatArray], measure: Callable[[FloatArray], float]
) -> tuple[float, float, float, float]:
    """Return a measure of the covariance, its standard error and 95 % interval, leaving out group by group.

    A bootstrap would repeat embeddings, which lowers ranks; leaving out a group of patients does not.

    Args:
        sums: one a group of patients, see :func:`covariance_of`.
        measure: such as :func:`participation_ratio`.

    Raises:
        ValueError: if there are fewer than two groups.
    """
    if len(sums) < 2:
        raise ValueError(f"sums must be of at least two groups of patients, got {len(sums)}.")
    value = measure(covariance_of(sums))
    without = np.array(
        [measure(covariance_of([*sums[:group], *sums[group + 1 :]])) for group in range(len(sums))]
    )
    error = float(np.sqrt((len(sums) - 1) * ((without - without.mean()) ** 2).mean()))
    return value, error, value - 1.96 * error, value + 1.96 * error
