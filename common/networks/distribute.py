"""How a network is spread over the ranks of a run, and compiled."""

from collections.abc import Iterator
from contextlib import contextmanager

import ignite.distributed as idist
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

SHARDINGS = ("ddp", "fsdp2")


def distribute(
    network: nn.Module, blocks: nn.ModuleList, sharding: str, compile_blocks: bool, device: torch.device
) -> nn.Module:
    """Move a network to its device, compile its blocks and wrap it for the ranks of the run.

    Blocks are compiled one by one, in place: they share one compilation for each input shape, gradients of a
    block are on their way to the other ranks while the next is computed, and names of weights do not change.

    Args:
        network: all parameters of the training step, or a teacher that does not learn; equal on all ranks.
        blocks: its repeated blocks, such as ``encoder.blocks``.
        sharding: ``ddp`` keeps the whole network on every rank; ``fsdp2`` shards parameters, gradients and
            optimizer state block by block, for networks that do not fit. Both compute the same.
        compile_blocks: whether to use ``torch.compile``; it needs a C++ compiler on a CPU, Triton on a GPU.
        device: of this rank.

    Returns:
        The network itself on one rank, with ``fsdp2`` and if it does not learn, else wrapped in
        DistributedDataParallel.

    Raises:
        ValueError: if ``sharding`` is neither of the two.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {SHARDINGS}, got '{sharding}'.")
    network = network.to(device)
    if compile_blocks:
        for block in blocks:
            block.compile(dynamic=False)
    if idist.get_world_size() == 1:
        return network
    learns = any(parameter.requires_grad for parameter in network.parameters())
    if sharding == "fsdp2":
        for block in blocks:
            fully_shard(block)
        # what is left of it is kept whole for the backward pass, where there is one
        fully_shard(network, reshard_after_forward=not learns)
        return network
    if not learns:
        return network
    return DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


@contextmanager
def gradients_stay_here(network: nn.Module, unless: bool) -> Iterator[None]:
    """Keep the ranks from exchanging gradients in a backward pass that others follow.

    Args:
        network: of ``distribute``.
        unless: whether this is the last backward pass of the step, after which the ranks must agree.
    """
    if isinstance(network, DistributedDataParallel) and not unless:
        with network.no_sync():
            yield
        return
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(unless)
    yield


def clip_by_global_norm(network: nn.Module, largest: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all parameters is at most ``largest``.

    Nothing waits for the device: the factor is computed and applied there.

    Args:
        network: of ``distribute``.
        largest: norm that is left as it is.

    Returns:
        The norm before, a scalar, the same on every rank.
    """
    norm = nn.utils.clip_grad_norm_(network.parameters(), largest).detach()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
