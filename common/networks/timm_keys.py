"""Encoder weights from the forms they are published in, to the plain keys of timm's VisionTransformer."""

import re
from collections.abc import Mapping

import torch

TRANSFORMERS = "embeddings.patch_embeddings.projection.weight"
"""A name that the state dictionaries of transformers' Dinov2 and Dinov2WithRegisters have."""

BLOCK, ATTENTION = r"encoder\.layer\.(\d+)\.", r"encoder\.layer\.(\d+)\.attention\."
RENAMED = (
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"layernorm\.", "norm."),
    (BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (BLOCK + r"(norm[12]|mlp\.fc[12])\.", r"blocks.\1.\2."),
    (ATTENTION + r"(?:output\.dense|o_proj)\.", r"blocks.\1.attn.proj."),
    (ATTENTION + r"(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r"blocks.\1.attn.\2."),
)
"""How names of transformers, versions 4 and 5, begin, and what they begin with in timm."""


def to_timm_keys(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights under timm's names, whichever of the known forms they come in.

    Known are timm's own names; the network of a pretraining checkpoint, of which the encoder is taken; and
    transformers' ``Dinov2Model`` and ``Dinov2WithRegistersModel``. Of the latter the position embedding of
    the CLS token is added to the token itself where the network has registers, as timm's networks with
    registers have none; a mask token, which no inference uses, is left out. Names that transformers does not
    have stay as they are, for a strict loader to refuse.

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
    if TRANSFORMERS in weights:
        return _from_transformers(weights)
    raise ValueError(
        "weights must have the names of timm, of a pretraining checkpoint or of transformers' Dinov2, got "
        f"{sorted(weights)[:3]}."
    )


def _from_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {_renamed(name): tensor for name, tensor in weights.items() if name != "embeddings.mask_token"}
    if {"reg_token", "cls_token", "pos_embed"} <= result.keys():
        result["cls_token"] = result["cls_token"] + result["pos_embed"][:, :1]
        result["pos_embed"] = result["pos_embed"][:, 1:]
    for query in [name for name in result if ".attn.q." in name]:
        three = [query.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if result.keys() >= set(three):
            joined = torch.cat([result.pop(name) for name in three])
            result[query.replace(".attn.q.", ".attn.qkv.")] = joined
    return result


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return name
