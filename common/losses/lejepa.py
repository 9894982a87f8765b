"""LeJEPA's loss: views of a slab agree, and SIGReg spreads a batch of them like a normal distribution."""

# V views (global ones first), N samples on this rank, K projection, M directions, J multiples of a spacing

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from common.run.distributed import global_mean_weights, sum_over_ranks


class LeJEPALoss(nn.Module):
    """Weigh invariance over views and a regularizer: (1 - lambda) invariance + lambda SIGReg.

    Source: LeJEPA, arXiv:2511.08544. Used in DALE-CT III-C1, Eq. 1.

    Args:
        regularizer: ``SIGReg``, or another module of projections and step that keeps a batch spread.
        sigreg_weight: lambda of Eq. 1. Released DALE-CT configurations: 0.02.

    Shape:
        Input ``(V, N, K)``, global views first. Output: dictionary of the scalars ``loss``, ``invariance``
        and, under its class's name in small letters, the regularizer's.

    Attributes:
        weights: weight of each of the two terms by its name.

    Raises:
        ValueError: if ``sigreg_weight`` lies outside [0, 1]; else as the regularizer and ``invariance_loss``.
    """

    def __init__(self, regularizer: nn.Module, sigreg_weight: float) -> None:
        super().__init__()
        if not 0 <= sigreg_weight <= 1:
            raise ValueError(f"sigreg_weight must lie in [0, 1], got {sigreg_weight}.")
        self.regularizer = regularizer
        self.name = type(regularizer).__name__.lower()
        self.weights = {"invariance": 1 - sigreg_weight, self.name: sigreg_weight}

    def forward(self, projections: torch.Tensor, num_global: int, step: int) -> dict[str, torch.Tensor]:
        """Return the loss and its two terms; the step chooses the regularizer's random directions."""
        terms = {
            "invariance": invariance_loss(projections, num_global),
            self.name: self.regularizer(projections, step),
        }
        return {"loss": sum(self.weights[name] * value for name, value in terms.items()), **terms}


def invariance_loss(projections: torch.Tensor, num_global: int) -> torch.Tensor:
    """Return the mean squared distance of all views ``(V, N, K)`` to the centre of the global views.

    The mean is over views, samples of the global batch and features: on several ranks the mean of the ranks'
    values is the value of the global batch. The centre has a gradient, too. In float32 unless given float64.

    Source: LeJEPA, arXiv:2511.08544, Eq. 5. Used in DALE-CT III-C1, Eq. 1.

    Raises:
        ValueError: if the projections are not three-dimensional or hold fewer than ``num_global`` views.

    Example:
        >>> invariance_loss(torch.tensor([[[0.0]], [[2.0]], [[4.0]]]), num_global=2)
        tensor(3.6667)
    """
    shape = tuple(projections.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"projections must have shape (V, N, K) with samples, got {shape}.")
    if not 1 <= num_global <= shape[0]:
        raise ValueError(f"num_global must be 1 to the number of views {shape[0]}, got {num_global}.")
    views = projections.to(torch.promote_types(projections.dtype, torch.float32))
    centre = views[:num_global].mean(0)
    by_sample = (centre - views).square().mean((0, 2))
    return (global_mean_weights(torch.ones_like(by_sample)) * by_sample).sum()


class SIGReg(nn.Module):
    """Sketched isotropic Gaussian regularization: pull a batch of projections towards N(0, I).

    Projects the samples on random unit directions and, per direction, integrates the squared distance between
    the characteristic function of the batch and exp(-t^2 / 2), that of the standard normal, weighted by
    exp(-t^2 / 2) (Epps-Pulley), times the number of samples. The integral is a trapezoid sum over knots
    spread evenly on [-t_max, t_max]; the integrand is even and 0 at t = 0, so that positive knots suffice.

    The batch is the global one: counts and characteristic functions are summed over the ranks, with gradient,
    before they are squared. Computed in float32 (float64 if given float64) even under autocast.

    Knots are multiples of one spacing, so that a projected value, an angle, needs one cosine and one sine:
    those of its multiples are powers of the same complex number, for the value as for the gradient. Between
    forward and backward only the angles are kept, ``V x N x M`` numbers, and a table without samples.
    ``benchmarks/sigreg.py`` compares time, memory and exactness with the equation as it stands.

    Source: LeJEPA, arXiv:2511.08544, Alg. 1. Used in DALE-CT III-C1, Eq. 1.

    Args:
        num_directions: random directions per step. LeJEPA and the released DALE-CT configurations: 1024.
        num_knots: knots of the quadrature on [-t_max, t_max]. Released DALE-CT code: 17. LeJEPA's 17 knots on
            [0, t_max] are 33 here.
        t_max: largest frequency; larger reacts to finer structure. Released DALE-CT code and LeJEPA: 3.
        compiled: whether to use ``torch.compile``; it needs a C++ compiler on a CPU, Triton on a GPU. The
            value is the same up to rounding; without it time and memory are some four to six times as large.

    Shape:
        Input ``(..., N, K)``, usually ``(V, N, K)``; the leading axes are averaged. Output: scalar.

    Raises:
        ValueError: if there is no direction, fewer than two knots or a t_max that is not positive; in a call,
            if the projections are not a batch of vectors, or the step is negative.
    """

    def __init__(self, num_directions: int, num_knots: int, t_max: float, compiled: bool) -> None:
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
        self.compiled = compiled
        # an even number of knots leaves out t = 0: they are the odd multiples of half their distance
        self.num_multiples = num_knots // 2 if num_knots % 2 else num_knots - 1

    def forward(self, projections: torch.Tensor, step: int) -> torch.Tensor:
        """Return the statistic of the global batch, the same on every rank, along the step's directions."""
        shape = tuple(projections.shape)
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"projections must have shape (..., N, K) with samples, got {shape}.")
        with torch.autocast(projections.device.type, enabled=False):
            samples = projections.to(torch.promote_types(projections.dtype, torch.float32))
            directions = unit_directions(shape[-1], self.num_directions, step, samples.dtype)
            directions *= self.t_max / self.num_multiples
            if samples.is_cuda:  # from pinned memory, so that the copy does not wait for the device
                directions = directions.pin_memory().to(samples.device, non_blocking=True)
            # samples last: their sums then run over neighbours in memory
            angles = (directions.T @ samples.flatten(0, -2).T).unflatten(1, (-1, shape[-2]))
            target, weights = self._quadrature(samples)
            return _SquaredDistance.apply(angles, target, weights, self.compiled)

    def _quadrature(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normal's characteristic function at each multiple, and weights for both signs."""
        multiples = torch.arange(1, self.num_multiples + 1, dtype=torch.float64, device=like.device)
        gaussian = torch.exp(-(multiples * self.t_max / self.num_multiples).square() / 2)
        weights = 2 * (2 * self.t_max / (self.num_knots - 1)) * gaussian
        weights[-1] /= 2  # the trapezoid's end
        if self.num_knots % 2 == 0:
            weights[1::2] = 0
        return gaussian.to(like.dtype), weights.to(like.dtype)


class _SquaredDistance(torch.autograd.Function):
    """The statistic of angles (M, V, N): projections times the spacing of the knots.

    Written out because autograd would keep every power of every sample's complex number.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (autograd's context)
        angles: torch.Tensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        compiled: bool,
    ) -> torch.Tensor:
        sums = sum_over_ranks(_kernel(_sums_over_samples, compiled)(angles, len(weights)))
        num_samples = sum_over_ranks(angles.new_full((), angles.shape[-1]))
        cosine, sine = sums[:, 0] / num_samples, sums[:, 1] / num_samples
        cosine -= target[:, None, None]
        value = num_samples * (weights @ (cosine.square() + sine.square()).mean((1, 2)))
        multiples = torch.arange(1, len(weights) + 1, device=angles.device)
        slopes = torch.stack([sine, -cosine], 1)
        slopes *= (2 * weights * multiples / cosine[0].numel())[:, None, None, None]
        ctx.save_for_backward(angles, slopes)
        ctx.compiled = compiled
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # noqa: ANN401
        angles, slopes = ctx.saved_tensors
        # every rank's loss depends on this rank's angles, and the ranks' losses add up
        slopes = slopes * sum_over_ranks(gradient)
        return _kernel(_sums_over_multiples, ctx.compiled)(angles, slopes), None, None, None


@functools.cache
def _kernel(function: Callable[..., torch.Tensor], compiled: bool) -> Callable[..., torch.Tensor]:
    return torch.compile(function) if compiled else function


def _sums_over_samples(angles: torch.Tensor, num_multiples: int) -> torch.Tensor:
    """Return the sums over N of cos(j angle) and sin(j angle) for j = 1 to J, as (J, 2, M, V).

    By e^(i j angle) = e^(i (j - 1) angle) e^(i angle), whose rounding errors add up. Chebyshev's recurrence
    has two operations less, but errors that grow with j^2 at small angles: too much for 33 knots.
    """
    cosine, sine = angles.cos(), angles.sin()
    real, imaginary = cosine, sine
    sums = [real.sum(-1), imaginary.sum(-1)]
    for _ in range(num_multiples - 1):
        real, imaginary = real * cosine - imaginary * sine, imaginary * cosine + real * sine
        sums += [real.sum(-1), imaginary.sum(-1)]
    return torch.stack(sums).unflatten(0, (num_multiples, 2))


def _sums_over_multiples(angles: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Return the sum over j of c_j0 cos(j angle) + c_j1 sin(j angle) for c (J, 2, M, V), as (M, V, N).

    This is the real part of a polynomial in e^(i angle) with coefficients c_j0 - i c_j1: Horner's scheme.
    """
    cosine, sine = angles.cos(), angles.sin()
    real, imaginary = torch.zeros_like(angles), torch.zeros_like(angles)
    for of_cosine, of_sine in reversed(coefficients.unsqueeze(-1).unbind()):
        real, imaginary = real + of_cosine, imaginary - of_sine
        real, imaginary = real * cosine - imaginary * sine, imaginary * cosine + real * sine
    return real


def unit_directions(
    num_features: int, num_directions: int, step: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Draw random unit vectors ``(K, M)`` that depend on the step alone: equal on every rank and device.

    Drawn on the CPU from a generator of their own; the global random state is neither read nor changed. They
    are normalized in ``dtype``; float64 is for checks of exactness.

    Raises:
        ValueError: if the step is negative.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}.")
    generator = torch.Generator().manual_seed(step)
    draws = torch.randn(num_features, num_directions, generator=generator)
    return functional.normalize(draws.to(dtype), dim=0)
