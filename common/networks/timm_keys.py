"""Encoder weights from the forms they are published in, to the plain keys of timm's VisionTransformer."""

import re
from collections.abc import Mapping

import torch

# transformers' names of Dinov2 and Dinov2WithRegisters, as written by versions 4 and 5, and timm's
OUTSIDE = {
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
}
QKV = (
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
)
BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


def to_timm_keys(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights under timm's names, whichever of the known forms they come in.

    Known are timm's own names; the network of a pretraining checkpoint, of which the encoder is taken; and
    transformers' ``Dinov2Model`` and ``Dinov2WithRegistersModel``. Of the latter the position embedding of
    the CLS token is added to the token itself where the network has registers, as timm's networks with
    registers have none; a mask token, which no inference uses, is left out.

    Args:
        weights: state dictionary.

    Raises:
        ValueError: if the names are of none of these forms.
    """
    if "cls_token" in weights and "patch_embed.proj.weight" in weights:
        return dict(weights)
    inner = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    if "patch_embed.proj.weight" in inner:
        return inner
    if "embeddings.patch_embeddings.projection.weight" in weights:
        return _from_transformers(weights)
    raise ValueError(
        "weights must have the names of timm, of a pretraining checkpoint or of transformers' Dinov2, got "
        f"{sorted(weights)[:3]}."
    )


def _from_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {own: weights[theirs] for theirs, own in OUTSIDE.items() if theirs in weights}
    cls_token, positions = weights["embeddings.cls_token"], weights["embeddings.position_embeddings"]
    if "reg_token" in result:
        result |= {"cls_token": cls_token + positions[:, :1], "pos_embed": positions[:, 1:]}
    else:
        result |= {"cls_token": cls_token, "pos_embed": positions}
    blocks: dict[int, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        match = BLOCK.fullmatch(name)
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = weight
    for number, block in sorted(blocks.items()):
        result |= {f"blocks.{number}.{name}": weight for name, weight in _block(block).items()}
    return result


def _block(block: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {f"ls{number}.gamma": block[f"layer_scale{number}.lambda1"] for number in (1, 2)}
    names = next(names for names in QKV if f"{names[0]}.weight" in block)
    for kind in ("weight", "bias"):
        result[f"attn.qkv.{kind}"] = torch.cat([block[f"{name}.{kind}"] for name in names])
        for theirs, own in IN_BLOCK.items():
            if f"{theirs}.{kind}" in block:
                result[f"{own}.{kind}"] = block[f"{theirs}.{kind}"]
    return result
