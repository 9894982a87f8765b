"""What is decayed, and that everything trainable is optimized."""

import timm
import torch

from common.optimizers.adamw import adamw


def test_only_matrices_and_embeddings_are_decayed():
    vit = timm.create_model(
        "vit_large_patch14_dinov2", img_size=28, embed_dim=12, depth=1, num_heads=2, num_classes=0
    )
    optimizer = adamw(vit, lr=1e-3, weight_decay=0.04)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in vit.named_parameters() if id(parameter) in decayed}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= names
    assert not any(name.endswith((".bias", "norm.weight", "gamma")) for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(vit.parameters()))
    assert {group["eps"] for group in optimizer.param_groups} == {1e-6}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_frozen_parameters_are_left_out():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5).requires_grad_(False))
    optimized = [
        p for group in adamw(network, lr=1.0, weight_decay=0.1).param_groups for p in group["params"]
    ]
    assert {tuple(parameter.shape) for parameter in optimized} == {(2, 3), (2,)}
