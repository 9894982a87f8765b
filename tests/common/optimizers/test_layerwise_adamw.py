"""Every parameter has the learning rate of its depth and decays if it is a matrix."""

import pytest
import timm
import torch

from common.networks.dino_model import DINOModel
from common.networks.heads import DINOHead
from common.optimizers.layerwise_adamw import layerwise_adamw


def network() -> DINOModel:
    vit = timm.create_model(
        "vit_large_patch14_reg4_dinov2",
        **{"in_chans": 1, "num_classes": 0, "img_size": 16, "patch_size": 8},
        **{"embed_dim": 16, "depth": 3, "num_heads": 2},
    )
    return DINOModel(vit, DINOHead(16, 9, 6, 11), DINOHead(16, 9, 6, 11))


def settings(wrapped: bool = False, layer_decay: float = 0.5) -> dict[str, dict]:
    """Group of each parameter by its name."""
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owner = (
        torch.nn.ModuleDict({"module": model}) if wrapped else model
    )  # as DistributedDataParallel names it
    optimizer = layerwise_adamw(owner, 3, 0.1, 0.04, layer_decay, patch_embed_lr_multiplier=0.2)
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
    optimizer = layerwise_adamw(network(), 3, 0.1, 0.04, 0.5, 0.2)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.param_groups[0]["is_last_layer"]
    assert optimizer.defaults["eps"] == 1e-8


def test_factors_without_sense_are_refused():
    with pytest.raises(ValueError, match="layer_decay must be above 0 and at most 1, got 1.5"):
        layerwise_adamw(network(), 3, 0.1, 0.04, 1.5, 0.2)
    with pytest.raises(ValueError, match="patch_embed_lr_multiplier must be positive, got 0"):
        layerwise_adamw(network(), 3, 0.1, 0.04, 1.0, 0)
