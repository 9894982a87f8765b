"""How embeddings are spread: over how many directions, with errors over patients, and how near to normal."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

# N embeddings, D embedding


FloatArray = NDArray[np.float64]


def effective_rank(embeddings: torch.Tensor) -> float:
    """Return exp(entropy) of the normalized singular values of the centred embeddings ``(N, D)``.

    1 when all embeddings lie on one line, min(N - 1, D) when they fill the space evenly, 0 when they are all
    the same, nan when one is not finite.

    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", 2007.

    Example:
        >>> round(effective_rank(torch.eye(4)), 3)
        3.0
    """
    with torch.no_grad():
        centred = embeddings.detach().float()
        centred = centred - centred.mean(0)
        if not torch.isfinite(centred).all():
            return float("nan")
        singular = torch.linalg.svdvals(centred)
        # below float32 rounding of the largest entry a singular value is noise, not a direction
        singular = singular[
            singular > 1e-6 * embeddings.detach().float().abs().max() * max(embeddings.shape) ** 0.5
        ]
        return _exp_entropy(singular.double().cpu().numpy())


def participation_ratio(covariance: ArrayLike) -> float:
    """Return (sum of the eigenvalues)^2 over the sum of their squares: 1 on a line, D where all are equal.

    nan where nothing varies. Source: DALE-CT's released world-model probes, P0.

    Args:
        covariance: ``(D, D)``, of the embeddings.
    """
    matrix = np.asarray(covariance, np.float64)
    squares = (matrix**2).sum()  # of a symmetric matrix the sum of the squared eigenvalues
    return float(np.trace(matrix) ** 2 / squares) if squares > 0 else float("nan")


def spectral_effective_rank(covariance: ArrayLike) -> float:
    """Return the effective rank of embeddings with this covariance ``(D, D)``; nan where nothing varies."""
    values = np.sqrt(np.linalg.eigvalsh(np.asarray(covariance, np.float64)).clip(min=0))
    return _exp_entropy(values[values > 1e-9 * values.max()]) or float("nan")


def covariance_of(sums: Sequence[FloatArray]) -> FloatArray:
    """Return the covariance of embeddings from the sums of their parts.

    Args:
        sums: ``features`` ``(1 + D, 1 + D)`` of :class:`common.metrics.linear_readout.Moments`, one per part.
    """
    total = np.sum(sums, axis=0)
    mean = total[0, 1:] / total[0, 0]
    covariance: FloatArray = total[1:, 1:] / total[0, 0] - np.outer(mean, mean)
    return covariance


def jackknife(
    sums: Sequence[FloatArray], measure: Callable[[FloatArray], float]
) -> tuple[float, float, float, float]:
    """Return a measure of the covariance, its standard error and 95 % interval, by leaving out each group.

    A bootstrap would repeat embeddings, which lowers ranks; leaving out a group of patients does not.

    Args:
        sums: one per group of patients, see :func:`covariance_of`.
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


def _exp_entropy(values: FloatArray) -> float:
    """Exponential of the entropy of the values' shares in their sum; 0 of none."""
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(values) else 0.0


def kolmogorov_smirnov(samples: torch.Tensor) -> torch.Tensor:
    """Return the largest distance between each dimension's distribution and the standard normal one.

    0 is perfect, 1 the worst; N samples of the standard normal have about 0.87 / sqrt(N). SIGReg looks in
    random directions, this one along the axes, which SIGReg never sees.

    Source: the Kolmogorov-Smirnov statistic; our choice of a measure.

    Args:
        samples: ``(N, K)``.

    Returns:
        float32 ``(K,)``.

    Raises:
        ValueError: if there is no sample, or not two axes.
    """
    if samples.ndim != 2 or len(samples) == 0:
        raise ValueError(f"samples must have shape (N, K) with samples, got {tuple(samples.shape)}.")
    ordered = samples.detach().double().sort(0).values
    expected = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    ranks = torch.arange(len(samples) + 1, device=samples.device, dtype=torch.float64)[:, None] / len(samples)
    return torch.maximum(expected - ranks[:-1], ranks[1:] - expected).amax(0).float()
