"""The encoders of others in bundles/_encoders: networks that take weights of their published names."""

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from common.embeddings.encoder_bundle import open_encoder_bundle
from common.networks.timm_keys import to_timm_keys

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
FILES = sorted((BUNDLES / "_encoders").glob("*.json"))


def opened(name: str, **knobs: object):
    knobs = {"encoder_weights": None, "device": torch.device("cpu"), "compiled": False} | knobs
    return open_encoder_bundle(BUNDLES / "dale_ct_0", [BUNDLES / "_encoders" / f"{name}.json"], knobs)


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_a_slice_becomes_a_token_of_the_stated_width(name):
    bundle = opened(name, depth=1)
    side = bundle["patch_size_px"] * 4
    with torch.inference_mode():
        assert bundle.network(torch.zeros(2, 1, side, side)).shape == (2, bundle["embed_dim"])
    assert bundle.side_px % bundle["patch_size_px"] == 0


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_rad_dino_has_the_names_and_shapes_of_transformers_dinov2_base():
    with torch.device("meta"):
        theirs = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))  # base: 768 wide, 12 blocks
    state = {name: torch.empty(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert shapes(to_timm_keys(state)) == shapes(opened("rad_dino").network.state_dict())


def test_dinov3_has_registers_and_rotary_positions():
    found = shapes(opened("dinov3_vit_l", depth=2).network.state_dict())
    assert found["patch_embed.proj.weight"] == (1024, 3, 16, 16)
    assert found["reg_token"] == (1, 4, 1024)
    assert found["blocks.1.mlp.fc1.weight"] == (4096, 1024)
    assert {"norm.weight", "norm.bias", "cls_token"} <= found.keys()
    assert not {"pos_embed", "fc_norm.weight"} & found.keys()
