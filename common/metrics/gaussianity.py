"""How far each dimension of a batch of projections is from the normal distribution SIGReg asks for."""

import math

import torch


def kolmogorov_smirnov(samples: torch.Tensor) -> torch.Tensor:
    """Return the largest distance between each dimension's distribution and the standard normal one.

    0 is perfect, 1 the worst; N samples of the standard normal have about 0.87 / sqrt(N). SIGReg looks in
    random directions, this one along the axes, which SIGReg never sees.

    Source: the Kolmogorov-Smirnov statistic; our choice of a measure.

    Args:
        samples: one sample per row.

    Shape:
        Input ``(N, K)``. Output: float32 ``(K,)``.

    Raises:
        ValueError: if there is no sample, or not two axes.

    Example:
        >>> kolmogorov_smirnov(torch.zeros(5, 1))
        tensor([0.5000])
    """
    if samples.ndim != 2 or len(samples) == 0:
        raise ValueError(f"samples must have shape (N, K) with samples, got {tuple(samples.shape)}.")
    ordered = samples.detach().double().sort(0).values
    expected = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    ranks = torch.arange(len(samples) + 1, device=samples.device, dtype=torch.float64)[:, None] / len(samples)
    return torch.maximum(expected - ranks[:-1], ranks[1:] - expected).amax(0).float()
