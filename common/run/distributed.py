"""Sums over the ranks of a run, with which each computes the value and gradient of the whole batch."""

# B samples on this rank

from typing import Any

import torch
from torch import distributed as dist

from common.run.process import rank_and_ranks


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 (autograd's context)
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 (autograd's context)
        # every rank's loss depends on this rank's tensor, and the ranks' losses add up
        return _SumOverRanks.apply(gradients[0])


def num_ranks() -> int:
    """Return the number of processes that share the global batch; 1 outside torch.distributed."""
    return rank_and_ranks()[1]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the ranks' tensors, the same on every rank, with a gradient to each of them.

    The gradient is that of the sum of all ranks' losses. DistributedDataParallel averages the gradients over
    the ranks, so a loss that has the same value on every rank ends up with its exact gradient.

    Args:
        tensor: tensor of the same shape and dtype on all ranks.

    Shape:
        Input ``(*)``. Output: ``(*)``; the input itself when there is one rank.
    """
    return _SumOverRanks.apply(tensor) if num_ranks() > 1 else tensor


def gather_over_ranks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the ranks' tensors side by side along an axis, with the gradient of ``sum_over_ranks``.

    Args:
        tensor: tensor of the same shape and dtype on all ranks.
        dim: axis of the samples.

    Shape:
        Input ``(..., B, ...)``. Output: ``(..., world_size B, ...)``; the input itself on one rank.
    """
    world, rank = num_ranks(), dist.get_rank() if num_ranks() > 1 else 0
    if world == 1:
        return tensor
    # a sum over ranks of tensors that are zero outside their place: one collective, one gradient rule
    empty = torch.zeros_like(tensor)
    places = [tensor if place == rank else empty for place in range(world)]
    return sum_over_ranks(torch.cat(places, dim=dim))


def global_mean_weights(included: torch.Tensor) -> torch.Tensor:
    """Return sample weights that turn sums on the ranks into the mean over the global batch.

    ``(weights * values).sum()``, averaged over the ranks, is the mean of the included samples' values over
    all ranks, however unevenly the ranks hold them. As DistributedDataParallel averages gradients, these are
    exact, too. Without an included sample on any rank all weights are 0.

    Args:
        included: 1.0 for a sample that counts, 0.0 for one that does not.

    Shape:
        Input ``(..., B)``; B may differ between ranks, the leading axes may not. Output: ``(..., B)``.

    Example:
        >>> global_mean_weights(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        tensor([[0.5000, 0.0000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    num_included = sum_over_ranks(included.sum(-1, keepdim=True))
    return num_ranks() * included / num_included.clamp(min=1)
