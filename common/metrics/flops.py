"""Floating-point operations of a training step, and what a device could do at best."""

from collections.abc import Mapping

import torch
from torch import nn

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

    Example:
        >>> import timm
        >>> vit = timm.create_model("vit_large_patch14_dinov2", in_chans=1, num_classes=0, depth=1,
        ...                         dynamic_img_size=True, patch_size=16, img_size=256)
        >>> training_flops(vit, {256: 2, 144: 8}) // 10**9
        92
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
    """Return a device's dense bfloat16 operations per second, or None where we do not know them.

    Example:
        >>> peak_bf16_flops(torch.device("cpu"))
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)
