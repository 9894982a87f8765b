"""What is decayed, and that everything trainable is optimized."""

import math

import pytest
import torch

from common.networks.dino_model import DINOHead, DINOModel
from common.optimizers.adamw import adamw, layerwise_adamw, warmup_cosine
from tests.common.conftest import tiny_vit


def test_only_matrices_and_embeddings_are_decayed():
    vit = tiny_vit()
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


def test_learning_rate_rises_linearly_and_falls_along_a_cosine_to_the_floor():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    scheduler = warmup_cosine(optimizer, warmup_steps=5, max_steps=50, final_lr=3e-5)
    used = []
    for _ in range(55):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used[0] == 0
    assert used[5] == pytest.approx(3e-4)
    assert used[3] == pytest.approx(3e-4 * 3 / 5)
    for step in (17, 31, 44):
        expected = 3e-5 + (3e-4 - 3e-5) * (1 + math.cos(math.pi * (step - 5) / 45)) / 2
        assert used[step] == pytest.approx(expected)
    assert used[50] == used[54] == pytest.approx(3e-5)


def test_warmup_longer_than_the_run_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps must be between 0 and max_steps = 10, got 11"):
        warmup_cosine(optimizer, warmup_steps=11, max_steps=10, final_lr=0.1)


def network() -> DINOModel:
    heads = [DINOHead(16, 9, 6, 11) for _ in range(2)]
    return DINOModel(tiny_vit("vit_large_patch14_reg4_dinov2", depth=3), *heads, checkpoint_activations=False)


def by_layer(owner: torch.nn.Module, **changes: float) -> torch.optim.AdamW:
    options = {"lr": 0.1, "weight_decay": 0.04, "layer_decay": 0.5, "patch_embed_lr_multiplier": 0.2}
    return layerwise_adamw(owner, depth=3, **options | changes)


def settings(wrapped: bool = False, layer_decay: float = 0.5) -> dict[str, dict]:
    """Group of each parameter by its name."""
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owner = (
        torch.nn.ModuleDict({"module": model}) if wrapped else model
    )  # as DistributedDataParallel names it
    optimizer = by_layer(owner, layer_decay=layer_decay)
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_learning_rate_halves_with_every_block_down(wrapped):
    expected = {
        "dino_head.mlp.0.weight": 1.0,
        "ibot_head.last_layer.weight": 1.0,
        "encoder.norm.weight": 1.0,
        "encoder.blocks.2.mlp.fc1.weight": 0.5,
        "encoder.blocks.0.ls1.gamma": 0.125,
        "encoder.cls_token": 0.0625,
        "encoder.reg_token": 0.0625,
        "encoder.pos_embed": 0.0625,
        "mask_token": 0.0625,
        "encoder.patch_embed.proj.weight": 0.0625 * 0.2,
        "encoder.patch_embed.proj.bias": 0.0625 * 0.2,
    }
    found = settings(wrapped)
    assert {name: found[name]["lr_multiplier"] for name in expected} == expected
    assert all(group["lr"] == pytest.approx(0.1 * group["lr_multiplier"]) for group in found.values())


def test_without_layer_decay_only_the_patch_embedding_is_slower():
    found = settings(layer_decay=1.0)
    slower = {name for name, group in found.items() if group["lr_multiplier"] != 1}
    assert slower == {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}


def test_matrices_and_embeddings_decay_and_the_last_layers_are_known():
    found = settings()
    parameters = dict(network().named_parameters())
    for name, group in found.items():
        assert group["decays"] == (parameters[name].ndim > 1), name
        assert group["weight_decay"] == (0.04 if group["decays"] else 0.0)
        assert group["is_last_layer"] == name.endswith("last_layer.weight")
    still = [name for name, group in found.items() if not group["decays"]]
    assert all(name.endswith((".bias", "gamma")) or ".norm" in name for name in still)


def test_the_first_group_is_at_the_peak():
    optimizer = by_layer(network())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.param_groups[0]["is_last_layer"]
    assert optimizer.defaults["eps"] == 1e-8


def test_factors_without_sense_are_refused():
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1, got 1.5"):
        by_layer(network(), layer_decay=1.5)
    with pytest.raises(ValueError, match="patch_embed_lr_multiplier must be positive, got 0"):
        by_layer(network(), patch_embed_lr_multiplier=0)
