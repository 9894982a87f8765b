"""The ranks of a run: how they meet, wait for each other, and compute the value and gradient of one batch."""

# B samples on this rank

import os
from datetime import timedelta
from typing import Any

import ignite.distributed as idist
import torch
from torch import distributed as dist

SET_BY_A_LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
STEP_TIMEOUT = timedelta(hours=1)
"""How late a rank may come to a sum within a step; rank 0 may be writing a checkpoint. NCCL: 10 minutes."""

RUN_TIMEOUT = timedelta(days=7)
"""How late a rank may come to a meeting of a whole run: shares of an embedding run differ by hours."""

_meeting: Any = None  # process group of all ranks, on CPUs, for what may take RUN_TIMEOUT


def join_ranks() -> None:
    """Connect this process with the other ranks of its run, if it has any.

    torchrun gives ranks their numbers, or srun does where it starts the ranks itself. Under ``srun torchrun``
    SLURM's numbers are those of the launchers, and Ignite, which wants them to be the ranks', must not see
    them.
    """
    global _meeting
    if os.environ.keys() >= SET_BY_A_LAUNCHER:
        os.environ.pop("SLURM_JOB_ID", None)
    # a step's tasks, not the job's: a command of a batch script without srun is one process
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    idist.initialize("nccl" if torch.cuda.is_available() else "gloo", timeout=STEP_TIMEOUT)
    _meeting = dist.new_group(backend="gloo", timeout=RUN_TIMEOUT)


def leave_ranks() -> None:
    """Disconnect from the other ranks, once all have come so far."""
    wait_for_ranks()
    idist.finalize()


def wait_for_ranks() -> None:
    """Return when all ranks of the run have called this, however late."""
    if num_ranks() > 1:
        dist.barrier(group=_meeting)


def gather_objects(own: Any) -> list[Any]:  # noqa: ANN401 (anything that can be pickled)
    """Return what each rank hands in, on every rank, when all have called this, however late.

    Args:
        own: of this rank; anything that can be pickled.

    Example:
        >>> gather_objects("one rank")
        ['one rank']
    """
    everyones: list[Any] = [own] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(everyones, own, group=_meeting)
    return everyones


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
    """Return the number of processes that share the global batch; 1 outside torch.distributed.

    Example:
        >>> num_ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of the ranks' tensors, the same on every rank, with a gradient to every rank's own.

    The gradient is that of the sum of all ranks' losses. DistributedDataParallel averages the gradients over
    the ranks, so a loss that has the same value on every rank ends up with its exact gradient.

    Args:
        tensor: of one shape and dtype on all ranks.

    Shape:
        Input ``(*)``. Output: ``(*)``; the input itself when there is one rank.

    Example:
        >>> sum_over_ranks(torch.tensor([2.0, 3.0]))
        tensor([2., 3.])
    """
    return _SumOverRanks.apply(tensor) if num_ranks() > 1 else tensor


def gather_over_ranks(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the ranks' tensors side by side along an axis, with the gradient of ``sum_over_ranks``.

    Args:
        tensor: of one shape and dtype on all ranks.
        dim: axis of the samples.

    Shape:
        Input ``(..., B, ...)``. Output: ``(..., world_size B, ...)``; the input itself on one rank.

    Example:
        >>> gather_over_ranks(torch.tensor([2.0, 3.0]), dim=0)
        tensor([2., 3.])
    """
    world, rank = num_ranks(), dist.get_rank() if num_ranks() > 1 else 0
    if world == 1:
        return tensor
    # a sum over ranks of tensors that are zero outside of their own place: one collective, one gradient rule
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
