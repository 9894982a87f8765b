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

from common.networks.encoder import load_strictly
from common.networks.timm_keys import to_timm_keys
from tests.released_weights import transformers_shapes

D = 1024

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
    return timm.create_model(name, in_chans=1, num_classes=0, dynamic_img_size=True, **sizes).eval()


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
    load_strictly(ours, to_timm_keys(weights), "theirs")
    # without registers, transformers resamples positions without the anti-aliasing of timm and DINOv2
    for height, width in ((42, 42), (28, 56)) if registers else ((42, 42),):
        image = torch.randn(3, 1, height, width)
        with torch.no_grad():
            expected = theirs(image).last_hidden_state
            torch.testing.assert_close(ours.forward_features(image), expected, rtol=1e-5, atol=1e-5)


def released() -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in transformers_shapes(D, 24).items()}


def network_of_the_bundle() -> torch.nn.Module:
    """Build what dinov2_ct builds, without memory."""
    sizes = {"img_size": 518, "patch_size": 14, "embed_dim": D, "depth": 24, "num_heads": 16}
    with torch.device("meta"):
        return timm.create_model("vit_large_patch14_reg4_dinov2", in_chans=1, num_classes=0, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.layer.3.mlp.fc3.weight": (D,)}, r"Unexpected.*encoder.layer.3.mlp.fc3.weight"),
        ({"pooler.dense.weight": (D, D)}, r"Unexpected.*pooler.dense.weight"),
        ({"encoder.layer.23.norm2.bias": None}, r"Missing.*blocks.23.norm2.bias"),
        (
            {"encoder.layer.0.attention.attention.key.bias": None},
            r"Missing.*blocks.0.attn.qkv.bias.*Unexpected.*attn.q.bias",
        ),
        ({"embeddings.register_tokens": None}, r"Missing.*reg_token"),
        (
            {"embeddings.position_embeddings": (1, 1 + 32 * 32, D)},
            r"pos_embed.*1, 1369, 1024",
        ),
        (
            {"embeddings.patch_embeddings.projection.weight": (D, 3, 14, 14)},
            r"patch_embed.proj.weight.*1, 14, 14",
        ),
    ],
)
def test_another_network_than_the_released_is_refused_by_name(change, message) -> None:
    weights = released()
    ((name, shape),) = change.items()
    weights.pop(name, None)
    if shape is not None:
        weights[name] = torch.empty(shape, device="meta")
    with pytest.raises(ValueError, match=message):
        load_strictly(network_of_the_bundle(), to_timm_keys(weights), "theirs")


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
