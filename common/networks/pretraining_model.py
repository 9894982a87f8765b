"""The network that is pretrained: encoder and heads, its place on the ranks, and what a step of it costs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import timm
import torch
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from common.networks.encoder import cls_and_patches
from common.networks.hub import be_quiet

# B slabs, V views (Vg global, Vl local), P patches, D embedding, K projection, C classes


class ProjectionHead(nn.Sequential):
    """Three-layer perceptron from the CLS token to the space where LeJEPA compares views.

    Linear, LayerNorm, GELU, twice, then Linear: ``(..., D)`` to ``(..., K)``.

    Source: DALE-CT III-C1; widths of the released configurations.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        projector_hidden_dim: width of the two hidden layers. Released DALE-CT configurations: 2048.
        projection_dim: K. Released DALE-CT configurations: 124.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(self, embed_dim: int, projector_hidden_dim: int, projection_dim: int) -> None:
        hidden = projector_hidden_dim
        check_positive(embed_dim=embed_dim, projector_hidden_dim=hidden, projection_dim=projection_dim)
        super().__init__(
            nn.Linear(embed_dim, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, projection_dim),
        )


class AuxiliaryHead(nn.Module):
    """Linear read-outs of organs and findings, each shared by CLS and patch tokens.

    Source: DALE-CT III-C2.

    Args:
        embed_dim: D, width of the encoder. ViT-L: 1024.
        num_ts_classes: TotalSegmentator classes with the background. DALE-CT III-C2: 118.
        num_rex_classes: ReXGroundingCT findings; 0 for none. DALE-CT-2S: 14, DALE-CT-1S: 0.
        train_auxiliary_head: whether it learns. The released code forgot to: its encoders serve a random
            read-out.
        prior_logits: the constant logits ``ts (num_ts_classes)`` and ``rex (num_rex_classes)`` that read-outs
            which learn start at, as ``common.cohort.cohort.prior_logits``; None for PyTorch's random start.

    Shape:
        Input ``(..., D)``. Output: dictionary of logits ``ts (..., num_ts_classes)`` and, if there are any
        findings, ``rex (..., num_rex_classes)``.

    Raises:
        ValueError: if a width is not positive, or the number of findings negative.
    """

    def __init__(
        self,
        embed_dim: int,
        num_ts_classes: int,
        num_rex_classes: int,
        train_auxiliary_head: bool,
        prior_logits: Mapping[str, Sequence[float]] | None,
    ) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_ts_classes=num_ts_classes)
        if num_rex_classes < 0:
            raise ValueError(f"num_rex_classes must not be negative, got {num_rex_classes}.")
        self.readouts = nn.ModuleDict({"ts": nn.Linear(embed_dim, num_ts_classes)})
        if num_rex_classes:
            self.readouts["rex"] = nn.Linear(embed_dim, num_rex_classes)
        if prior_logits is not None and train_auxiliary_head:
            for source, module in self.readouts.items():
                readout = cast(nn.Linear, module)
                nn.init.zeros_(readout.weight)
                with torch.no_grad():
                    readout.bias.copy_(torch.tensor(prior_logits[source]))
        self.requires_grad_(train_auxiliary_head)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits of every source for every token."""
        return {source: readout(tokens) for source, readout in self.readouts.items()}


def check_positive(**sizes: int) -> None:
    """Refuse widths and numbers below 1, by their names."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}.")


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
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.set_grad_checkpointing(checkpoint_activations)  # type: ignore[operator]
        self.projector = projector
        self.auxiliary_head = auxiliary_head

    def forward(self, global_views: torch.Tensor, local_views: torch.Tensor) -> dict[str, Any]:
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


def start_from_timm(encoder: nn.Module, vit: str, initial_weights: str | None) -> nn.Module:
    """Give an encoder the weights that timm publishes for its architecture, fitted to it as timm does.

    The three input channels are added up to one, and position embeddings resampled to its grid. DALE-CT's
    Table V starts its ViT-B arms from DINOv2, all others from scratch.

    Args:
        encoder: timm VisionTransformer with one input channel.
        vit: timm's name with the tag of the weights, such as
            ``vit_base_patch14_reg4_dinov2.lvd142m``.
        initial_weights: None for the random weights it has, ``hub`` to download, or the path of timm's file.

    Returns:
        The same encoder, for use in a config.

    Raises:
        FileNotFoundError: if there is no such file, or neither hub nor cache gives it.
        ValueError: if the encoder is not of that architecture.
    """
    if initial_weights is None:
        return encoder
    if initial_weights != "hub" and not Path(initial_weights).is_file():
        raise FileNotFoundError(
            f"initial_weights must be 'hub' or a file of timm's weights, got '{initial_weights}'."
        )
    patch_embed: Any = encoder.patch_embed
    blocks: Any = encoder.blocks
    be_quiet()
    try:
        published = timm.create_model(
            vit,
            pretrained=True,
            pretrained_cfg_overlay=None if initial_weights == "hub" else {"file": str(initial_weights)},
            in_chans=1,
            num_classes=0,
            img_size=patch_embed.img_size,
            patch_size=patch_embed.patch_size,
            embed_dim=encoder.embed_dim,
            depth=len(blocks),
            num_heads=blocks[0].attn.num_heads,
        )
        encoder.load_state_dict(published.state_dict(), strict=True)
    except OSError as error:  # what the hub's client raises
        raise FileNotFoundError(
            f"Cannot download timm's '{vit}' for initial_weights '{initial_weights}' "
            f"({str(error).splitlines()[0]}). Go online, or pass the path of timm's safetensors file."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"The network is not timm's '{vit}', so it cannot start from its weights: vit, embed_dim, "
            f"depth or num_heads differ ({str(error).splitlines()[1].strip()})."
        ) from error
    return encoder


def distribute(
    *, network: nn.Module, blocks: nn.ModuleList, sharding: str, compiled: bool, device: torch.device
) -> nn.Module:
    """Move a network to its device, compile its blocks and wrap it for the ranks of the run.

    Blocks are compiled one by one, in place: they share one compilation for each input shape, gradients of a
    block are on their way to the other ranks while the next is computed, and names of weights do not change.

    Args:
        network: all parameters of the training step, or a teacher that does not learn; equal on all ranks.
        blocks: its repeated blocks, such as ``encoder.blocks``.
        sharding: ``ddp`` keeps the whole network on every rank; ``fsdp2`` shards parameters, gradients and
            optimizer state block by block, for networks that do not fit. Both compute the same.
        compiled: whether to use ``torch.compile``; it needs a C++ compiler on a CPU, Triton on a GPU.
        device: device of this rank.

    Returns:
        The network itself on one rank, with ``fsdp2`` and if it does not learn, else wrapped in
        DistributedDataParallel.

    Raises:
        ValueError: if ``sharding`` is neither of the two.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {SHARDINGS}, got '{sharding}'.")
    network = network.to(device)
    _use_plain_products(network, device)
    if compiled:
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


class _PatchProduct(nn.Conv2d):
    """The convolution that embeds patches, strides as long as its kernel, as one matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """Return ``(N, D, H / patch, W / patch)`` of images ``(N, 1, H, W)``."""
        pixels = functional.pixel_unshuffle(input, self.kernel_size[0]).movedim(1, -1).contiguous()
        return functional.linear(pixels, self.weight.flatten(1), self.bias).movedim(-1, 1)


def _use_plain_products(network: nn.Module, device: torch.device) -> None:
    """Let a CPU embed patches and attend by matrix products: the same sums, in another order.

    In bfloat16, and views of less than some 300 tokens, the gradient of PyTorch's fused attention takes ten
    times as long on a CPU, and so does that of the convolution in any type.
    """
    for module in network.modules() if device.type == "cpu" else ():
        if isinstance(module, Attention):
            module.fused_attn = False  # type: ignore[misc]  # final for TorchScript alone
        elif isinstance(module, PatchEmbed):
            module.proj.__class__ = _PatchProduct


@contextmanager
def gradients_stay_here(network: nn.Module, unless: bool) -> Iterator[None]:
    """Keep the ranks from exchanging gradients in a backward pass, ``unless`` it is the step's last."""
    if isinstance(network, DistributedDataParallel) and not unless:
        with network.no_sync():
            yield
        return
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(unless)
    yield


def clip_by_global_norm(network: nn.Module, largest: float) -> torch.Tensor:
    """Scale the gradients so that their norm over all parameters is at most ``largest``; return it as it was.

    Nothing waits for the device: the factor is computed and applied there. The norm is the same on every
    rank.
    """
    norm = nn.utils.clip_grad_norm_(network.parameters(), largest).detach()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def encoder_gradient_norm(network: nn.Module) -> torch.Tensor:
    """Return the norm of the gradients of ``network.encoder``'s parameters, the same on every rank."""
    whole: Any = network.module if isinstance(network, DistributedDataParallel) else network
    gradients = [parameter.grad for parameter in whole.encoder.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


PEAK_BF16_FLOPS: Mapping[str, float] = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second, by a part of the device's name. Source: the maker's data sheets."""


def training_flops(encoder: nn.Module, views: Mapping[int, int]) -> int:
    """Count the operations of one slab's views through the encoder, forward and backward.

    Matrix products and attention only. The backward pass computes two products for each one of the forward
    pass: three times the forward count. Heads and losses, below 1 % for a ViT-L, are left out, and so is what
    activation checkpointing computes again.

    Args:
        encoder: timm VisionTransformer with one input channel.
        views: side of a view in pixels to number of such views.
    """
    patch_px: int = encoder.patch_embed.patch_size[0]  # type: ignore[union-attr, index, assignment]
    width: int = encoder.embed_dim  # type: ignore[assignment]
    weights = [module.weight for module in encoder.blocks.modules() if isinstance(module, nn.Linear)]  # type: ignore[union-attr]
    num_blocks = len(encoder.blocks)  # type: ignore[arg-type]
    total = 0
    for size_px, num_views in views.items():
        num_patches = (size_px // patch_px) ** 2
        num_tokens = num_patches + int(encoder.num_prefix_tokens)  # type: ignore[arg-type]
        linear = 2 * num_tokens * sum(weight.numel() for weight in weights)
        attention = 2 * 2 * num_tokens**2 * width * num_blocks
        total += 3 * num_views * (2 * num_patches * width * patch_px**2 + linear + attention)
    return total


def peak_bf16_flops(device: torch.device) -> float | None:
    """Return a device's dense bfloat16 operations per second, or None where we do not know them."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
