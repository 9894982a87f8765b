"""The network that is pretrained: encoder, projector and, for the guided variants, the auxiliary head."""

from collections.abc import Iterator
from contextlib import contextmanager

import ignite.distributed as idist
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from common.networks.encoder import cls_and_patches

# D embedding, K projection or prototypes, C classes


class ProjectionHead(nn.Sequential):
    """Three-layer perceptron from the CLS token to the space where LeJEPA compares views.

    Linear, LayerNorm, GELU, twice, then Linear.

    Source: DALE-CT III-C1; widths of the released configurations.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        hidden_dim: width of the two hidden layers. Released DALE-CT configurations: 2048.
        out_dim: K, width of the projection. Released DALE-CT configurations: 124.

    Shape:
        Input ``(..., D)``. Output: ``(..., K)``.

    Raises:
        ValueError: if a width is not positive.

    Example:
        >>> ProjectionHead(embed_dim=16, hidden_dim=32, out_dim=5)(torch.zeros(3, 16)).shape
        torch.Size([3, 5])
    """

    def __init__(self, embed_dim: int, hidden_dim: int, out_dim: int) -> None:
        _check_positive(embed_dim=embed_dim, hidden_dim=hidden_dim, out_dim=out_dim)
        super().__init__(
            nn.Linear(embed_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim),
        )


class AuxiliaryHead(nn.Module):
    """Linear read-outs of organs and findings, each shared by CLS and patch tokens.

    Source: DALE-CT III-C2.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        num_ts_classes: TotalSegmentator classes with the background. DALE-CT III-C2: 118.
        num_rex_classes: ReXGroundingCT findings; 0 for none. DALE-CT-2S: 14, DALE-CT-1S: 0.
        trained: whether it learns. The released code forgot to: its encoders serve a random read-out.

    Shape:
        Input ``(..., D)``. Output: dictionary of logits ``ts (..., num_ts_classes)`` and, if there are any
        findings, ``rex (..., num_rex_classes)``.

    Raises:
        ValueError: if a width is not positive, or the number of findings negative.

    Example:
        >>> head = AuxiliaryHead(embed_dim=16, num_ts_classes=118, num_rex_classes=14)
        >>> logits = head(torch.zeros(3, 81, 16))
        >>> {source: tuple(tensor.shape) for source, tensor in logits.items()}
        {'ts': (3, 81, 118), 'rex': (3, 81, 14)}
    """

    def __init__(
        self, embed_dim: int, num_ts_classes: int, num_rex_classes: int, trained: bool = True
    ) -> None:
        super().__init__()
        _check_positive(embed_dim=embed_dim, num_ts_classes=num_ts_classes)
        if num_rex_classes < 0:
            raise ValueError(f"num_rex_classes must not be negative, got {num_rex_classes}.")
        self.readouts = nn.ModuleDict({"ts": nn.Linear(embed_dim, num_ts_classes)})
        if num_rex_classes:
            self.readouts["rex"] = nn.Linear(embed_dim, num_rex_classes)
        self.requires_grad_(trained)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of every source for every token."""
        return {source: readout(tokens) for source, readout in self.readouts.items()}


class DINOHead(nn.Module):
    """Three-layer perceptron to the unit sphere, then the cosine of the angle to every prototype.

    Linear, GELU, twice, Linear, unit length; the last layer has rows of unit length and no bias. Weights
    start from a normal distribution of width 0.02, cut off at two.

    Source: DINO, arXiv:2104.14294, appendix C, as in DINOv2, but with the length of a prototype fixed at 1
    (DINO's ``norm_last_layer``; DINOv2 starts it at 1). Sizes: DINOv2's defaults, which DALE-CT's code names.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        hidden_dim: width of the two hidden layers. 2048.
        bottleneck_dim: dimensions of the sphere. 256.
        num_prototypes: K. 65,536.

    Shape:
        Input ``(..., D)``. Output: ``(..., K)``, within [-1, 1].

    Raises:
        ValueError: if a width is not positive.

    Example:
        >>> head = DINOHead(embed_dim=16, hidden_dim=32, bottleneck_dim=8, num_prototypes=5)
        >>> head(torch.zeros(3, 16)).shape
        torch.Size([3, 5])
    """

    def __init__(self, embed_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int) -> None:
        _check_positive(
            embed_dim=embed_dim,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_prototypes=num_prototypes,
        )
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the cosines."""
        points = functional.normalize(self.mlp(tokens), dim=-1, eps=1e-6)  # a bfloat16 is as small
        return functional.linear(points, functional.normalize(self.last_layer.weight, dim=-1))


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}.")


# B slabs, V views (Vg global, Vl local), P patches, D embedding, K projection, C classes


class PretrainingModel(nn.Module):
    """Encode all views of a batch of slabs symmetrically and read out projections and auxiliary logits.

    Global and local views go through the encoder as two dense batches, for they differ in size.
    One ``forward`` holds every trained parameter, so that DistributedDataParallel sees them all.

    Source: DALE-CT III-C, Eq. 1-3.

    Args:
        encoder: timm VisionTransformer with one input channel.
        projector: head on the CLS token, kept for pretraining only.
        auxiliary_head: linear read-outs shared by CLS and patch tokens; None for DALE-CT-0.
        checkpoint_activations: whether blocks keep their input only and compute the rest again in the
            backward pass: less memory, a third more time.

    Shape:
        ``global_views (B, Vg, 1, S, S)``, ``local_views (B, Vl, 1, s, s)``. Output: ``projections
        (Vg + Vl, B, K)``, global views first; ``cls (B, Vg, D)`` of the global views; ``logits``: for the
        groups "global" and "local" a dictionary of ``ts_cls (B, V, C)``, ``ts_patch (B, V, P, C)`` and the
        same for ``rex``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: ProjectionHead,
        auxiliary_head: AuxiliaryHead | None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_grad_checkpointing(checkpoint_activations)  # type: ignore[operator]
        self.projector = projector
        self.auxiliary_head = auxiliary_head

    def forward(self, global_views: torch.Tensor, local_views: torch.Tensor) -> dict:
        """Encode the views; see the class."""
        projections, logits, cls_tokens = [], {}, []
        for group, views in (("global", global_views), ("local", local_views)):
            batch, num_views = views.shape[:2]
            cls, patches = cls_and_patches(self.encoder, views.flatten(0, 1))
            projections.append(self.projector(cls).unflatten(0, (batch, num_views)).transpose(0, 1))
            cls_tokens.append(cls.unflatten(0, (batch, num_views)))
            if self.auxiliary_head is not None:
                outputs = {"cls": self.auxiliary_head(cls), "patch": self.auxiliary_head(patches)}
                logits[group] = {
                    f"{source}_{level}": tensor.unflatten(0, (batch, num_views))
                    for level, by_source in outputs.items()
                    for source, tensor in by_source.items()
                }
        return {"projections": torch.cat(projections), "cls": cls_tokens[0], "logits": logits}


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
