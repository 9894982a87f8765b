"""Published weights give the tokens of the network they were published for."""

import pytest
import timm
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from common.networks.timm_keys import to_timm_keys

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 4}
SIZES |= {"image_size": 42, "patch_size": 14, "num_channels": 1}
VERSION_4 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def timm_vit(registers: bool) -> torch.nn.Module:
    name = "vit_large_patch14_reg4_dinov2" if registers else "vit_large_patch14_dinov2"
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 42}
    return timm.create_model(name, in_chans=1, num_classes=0, **sizes).eval()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("registers", [True, False])
def test_transformers_own_network_gives_the_same_tokens(registers: bool, version: int) -> None:
    torch.manual_seed(0)
    kind = (Dinov2WithRegistersModel, Dinov2WithRegistersConfig) if registers else (Dinov2Model, Dinov2Config)
    theirs = kind[0](kind[1](**SIZES)).eval()
    with (
        torch.no_grad()
    ):  # LayerScale and positions start equal for all: nothing would show if they were mixed up
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    weights = theirs.state_dict()
    if version == 4:
        for new, old in VERSION_4.items():
            weights = {name.replace(new, old): weight for name, weight in weights.items()}
    ours = timm_vit(registers)
    ours.load_state_dict(to_timm_keys(weights), strict=True)
    image = torch.randn(3, 1, 42, 42)
    with torch.no_grad():
        expected = theirs(image).last_hidden_state
        torch.testing.assert_close(ours.forward_features(image), expected, rtol=1e-5, atol=1e-5)


def test_timms_own_names_and_those_of_a_checkpoint_are_taken_as_they_are() -> None:
    weights = timm_vit(True).state_dict()
    assert to_timm_keys(weights).keys() == weights.keys()
    checkpoint = {f"encoder.{name}": weight for name, weight in weights.items()}
    taken = to_timm_keys(checkpoint | {"projector.0.weight": torch.zeros(1)})
    assert taken.keys() == weights.keys()
    assert torch.equal(taken["blocks.1.attn.qkv.weight"], weights["blocks.1.attn.qkv.weight"])


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights must have the names of timm, .* got \['conv1.weight'\]"):
        to_timm_keys({"conv1.weight": torch.zeros(1)})
