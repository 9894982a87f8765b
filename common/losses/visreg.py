"""VISReg: spread, location and shape of a batch against the normal distribution, in place of SIGReg."""

# V views, N samples of the global batch, K projection, M directions

import math

import torch
from torch import nn

from common.losses.lejepa import unit_directions
from common.run.distributed import gather_over_ranks

EPSILON = 1e-12
"""Keeps the gradient of the standard deviation finite where a dimension has collapsed. Our choice."""


class VISReg(nn.Module):
    """Pull a batch of projections towards N(0, I) by its mean, its standard deviation and its quantiles.

    Half the mean squared mean, half the mean squared distance of the standard deviations from 1, and twice
    the sliced Wasserstein distance: along each random unit direction, the mean squared distance of the
    sorted, standardized samples from the normal quantiles of (i + 1/2) / N. The standard deviations that
    standardize have no gradient: spread is the second term's concern.

    The batch is the global one: every rank sorts the samples of all. Computed in float32 (float64 if given
    float64) even under autocast.

    Source: the released DALE-CT code's alternative to SIGReg (weights, directions); the paper has none of it.
    Written from its description. Its authors saw a first run of it collapse.

    Args:
        num_directions: random directions per step. Released: 4,096.
        scale_weight: weight of the standard deviations' term.
        shape_weight: weight of the sliced Wasserstein distance.
        centre_weight: weight of the means' term.

    Shape:
        Input ``(V, N, K)``; views are averaged. Output: scalar.

    Raises:
        ValueError: if there is no direction; in a call, if there are fewer than two samples.
    """

    def __init__(
        self,
        num_directions: int,
        scale_weight: float = 0.5,
        shape_weight: float = 2.0,
        centre_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if num_directions < 1:
            raise ValueError(f"num_directions must be positive, got {num_directions}.")
        self.num_directions = num_directions
        self.weights = (scale_weight, shape_weight, centre_weight)

    def forward(self, projections: torch.Tensor, step: int) -> torch.Tensor:
        """Return the regularizer of as many projections on every rank; the step seeds the directions."""
        local = projections.to(torch.promote_types(projections.dtype, torch.float32))
        with torch.autocast(local.device.type, enabled=False):
            samples = gather_over_ranks(local, dim=1)
            num_samples = samples.shape[1]
            if samples.dim() != 3 or num_samples < 2:
                raise ValueError(
                    f"projections must have shape (V, N, K) with two samples, got {tuple(samples.shape)}."
                )
            mean = samples.mean(1, keepdim=True)
            centred = samples - mean
            std = (centred.square().mean(1, keepdim=True) + EPSILON).sqrt()
            directions = unit_directions(samples.shape[2], self.num_directions, step).to(samples)
            ordered = ((centred / std.detach()) @ directions).sort(1).values
            places = (torch.arange(num_samples).to(samples) + 0.5) / num_samples
            quantiles = math.sqrt(2) * torch.erfinv(2 * places - 1)
            scale_weight, shape_weight, centre_weight = self.weights
            return (
                scale_weight * (1 - std).square().mean()
                + shape_weight * (ordered - quantiles[:, None]).square().mean()
                + centre_weight * mean.square().mean()
            )
