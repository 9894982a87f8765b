"""SIGReg: the regularizer that keeps LeJEPA's projections from collapsing."""

# V views, N samples on this rank, K projection, M directions, J positive knots

import torch
from torch import nn
from torch.nn import functional

from common.distributed import sum_over_ranks


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularization: pull a batch of projections towards N(0, I).

    Projects the samples on random unit directions and, per direction, integrates the squared distance between
    the characteristic function of the batch and exp(-t^2 / 2), that of the standard normal, weighted by
    exp(-t^2 / 2) (Epps-Pulley), times the number of samples. The integral is a trapezoid sum over knots
    spread evenly on [-t_max, t_max]; the integrand is even and 0 at t = 0, so that positive knots suffice.

    The batch is the global one: counts and characteristic functions are summed over the ranks, with gradient,
    before they are squared. Computed in float32 (float64 if given float64) even under autocast.

    Source: LeJEPA, arXiv:2511.08544, Alg. 1. Used in DALE-CT III-C1, Eq. 1.

    Args:
        num_directions: random directions per step. LeJEPA and the released DALE-CT configurations: 1024.
        num_knots: knots of the quadrature on [-t_max, t_max]. Released DALE-CT code: 17. LeJEPA's 17 knots on
            [0, t_max] are 33 here.
        t_max: largest frequency; larger reacts to finer structure. Released DALE-CT code and LeJEPA: 3.

    Shape:
        Input ``(..., N, K)``, usually ``(V, N, K)``; the leading axes are averaged. Output: scalar.

    Raises:
        ValueError: if there is no direction, fewer than two knots or a t_max that is not positive; in a call,
            if the projections are not a batch of vectors, or the step is negative.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> normal = torch.randn(1, 512, 16)
        >>> sigreg = SIGReg()
        >>> bool(sigreg(normal, step=0) < sigreg(3 * normal, step=0))
        True
    """

    def __init__(self, num_directions: int = 1024, num_knots: int = 17, t_max: float = 3.0) -> None:
        super().__init__()
        if num_directions < 1:
            raise ValueError(f"num_directions must be at least 1, got {num_directions}.")
        if num_knots < 2:
            raise ValueError(f"num_knots must be at least 2, got {num_knots}.")
        if not t_max > 0:
            raise ValueError(f"t_max must be positive, got {t_max}.")
        self.num_directions = num_directions
        self.num_knots = num_knots
        self.t_max = t_max

    def forward(self, projections: torch.Tensor, step: int) -> torch.Tensor:
        """Return the statistic of the global batch, the same on every rank.

        Args:
            projections: see the class.
            step: optimizer step; it alone chooses the directions.
        """
        shape = tuple(projections.shape)
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"projections must have shape (..., N, K) with samples, got {shape}.")
        with torch.autocast(projections.device.type, enabled=False):
            samples = projections.to(torch.promote_types(projections.dtype, torch.float32))
            directions = unit_directions(shape[-1], self.num_directions, step, samples.dtype)
            knots, target, weights = self._quadrature(samples)
            angles = (samples @ directions.to(samples.device)).unsqueeze(-1) * knots
            sums = sum_over_ranks(torch.stack([angles.cos().sum(-3), angles.sin().sum(-3)]))
            num_samples = sum_over_ranks(samples.new_full((), shape[-2]))
            cosine, sine = sums / num_samples
            squared_distance = (cosine - target).square() + sine.square()
            return num_samples * (squared_distance @ weights).mean()

    def _quadrature(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return positive knots, the normal's characteristic function there, and weights for both signs."""
        knots = torch.linspace(-self.t_max, self.t_max, self.num_knots, dtype=like.dtype, device=like.device)
        knots = knots[(self.num_knots + 1) // 2 :]
        gaussian = torch.exp(-knots.square() / 2)
        weights = 2 * (2 * self.t_max / (self.num_knots - 1)) * gaussian
        weights[-1] /= 2  # the trapezoid's end
        return knots, gaussian, weights


def unit_directions(
    num_features: int, num_directions: int, step: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw random unit vectors that depend on the step alone: equal on every rank and device.

    Drawn on the CPU from a generator of their own; the global random state is neither read nor changed.

    Args:
        num_features: length of a direction.
        num_directions: number of directions.
        step: seed of the draw.
        dtype: type they are normalized in. SIGReg's own is float32; float64 is for checks of exactness.

    Shape:
        Output: ``(K, M)`` = (num_features, num_directions), on the CPU.

    Raises:
        ValueError: if the step is negative.

    Example:
        >>> directions = unit_directions(16, 3, step=7)
        >>> torch.allclose(directions.norm(dim=0), torch.ones(3))
        True
        >>> bool((directions == unit_directions(16, 3, step=8)).any())
        False
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}.")
    generator = torch.Generator().manual_seed(step)
    draws = torch.randn(num_features, num_directions, generator=generator)
    return functional.normalize(draws.to(dtype), dim=0)
