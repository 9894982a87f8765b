"""AdamW as DALE-CT's pretraining uses it."""

import math
import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def adamw(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Build AdamW with betas (0.9, 0.999) and eps 1e-6, without weight decay on one-dimensional parameters.

    Norms, biases and LayerScale are one-dimensional; position embedding and class token are decayed. One
    fused kernel updates all parameters that require a gradient, the auxiliary head's included.

    Source: recipe of the DALE-CT release (the paper does not state it).
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim > 1],
            "weight_decay": weight_decay,
        },
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-6, fused=True)


def warmup_cosine_factor(step: int, warmup_steps: int, max_steps: int, floor: float) -> float:
    """Return the share of the peak learning rate that optimizer step number ``step`` (from 0) uses.

    It rises linearly from 0 to 1 at ``warmup_steps`` and falls along a cosine to ``floor`` at ``max_steps``.

    Example:
        >>> [round(warmup_cosine_factor(s, 2, 6, 0.1), 3) for s in (0, 1, 2, 4, 6, 9)]
        [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, max_steps: int, final_lr: float) -> LambdaLR:
    """Schedule every group from 0 to its ``lr`` at ``warmup_steps`` and to ``final_lr`` at ``max_steps``.

    Source: DALE-CT's recipe: 0 to 3e-4 over 5,000 steps, cosine to 3e-5 at 50,000.

    Raises:
        ValueError: if the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps <= max_steps:
        raise ValueError(f"warmup_steps must be between 0 and max_steps = {max_steps}, got {warmup_steps}.")
    factor = partial(warmup_cosine_factor, warmup_steps=warmup_steps, max_steps=max_steps)
    return LambdaLR(
        optimizer, [partial(factor, floor=final_lr / group["lr"]) for group in optimizer.param_groups]
    )


BELOW_THE_BLOCKS = re.compile(
    r"(^|\.)encoder\.(pos_embed|patch_embed\b.*|cls_token|reg_token)$|(^|\.)mask_token$"
)
BLOCK = re.compile(r"(^|\.)encoder\.blocks\.(\d+)\.")
PATCH_EMBED = re.compile(r"(^|\.)encoder\.patch_embed\.")
LAST_LAYER = re.compile(r"(^|\.)last_layer\.")


def layerwise_adamw(
    network: nn.Module,
    *,
    depth: int,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    patch_embed_lr_multiplier: float,
) -> torch.optim.AdamW:
    """Build AdamW with betas (0.9, 0.999) and eps 1e-8, its groups ready for ``DINOSchedule``.

    A group holds parameters with the same ``lr_multiplier``, ``decays`` (False for one-dimensional ones:
    biases, norms, LayerScale) and ``is_last_layer`` (of a head); one fused kernel updates all.

    Source: DINOv2, arXiv:2304.07193, and its ViT-L/14 configuration: no layer decay, a fifth of the learning
    rate for the patch embedding. Register tokens count as below the blocks, as the class token does.

    Args:
        network: ``DINOModel``, distributed or not; parameters that require a gradient are optimized.
        depth: blocks of its encoder.
        lr: peak learning rate of the heads, and of everything else before its multiplier.
        weight_decay: decay of matrices and embeddings at the first step.
        layer_decay: factor from a block's learning rate to the one of the block below; 1 for none.
        patch_embed_lr_multiplier: further factor for the patch embedding.

    Raises:
        ValueError: if ``layer_decay`` is not above 0 and at most 1, or the multiplier not positive.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}.")
    if not patch_embed_lr_multiplier > 0:
        raise ValueError(f"patch_embed_lr_multiplier must be positive, got {patch_embed_lr_multiplier}.")
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        multiplier = layer_decay ** (depth + 1 - _layer(name, depth))
        if PATCH_EMBED.search(name):
            multiplier *= patch_embed_lr_multiplier
        key = (multiplier, parameter.ndim > 1, LAST_LAYER.search(name) is not None)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "lr": lr * multiplier,
                "weight_decay": weight_decay if key[1] else 0.0,
                "lr_multiplier": multiplier,
                "decays": key[1],
                "is_last_layer": key[2],
            },
        )
        group["params"].append(parameter)
    # the first group's learning rate is the one that is recorded: the peak's
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], item[0][2], item[0][1]))
    return torch.optim.AdamW([group for _, group in ordered], lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _layer(name: str, depth: int) -> int:
    """Return 0 below the blocks, the block's number from 1, or depth + 1 above them."""
    if BELOW_THE_BLOCKS.search(name):
        return 0
    block = BLOCK.search(name)
    return int(block.group(2)) + 1 if block else depth + 1
