"""One forward gives what Eq. 1 to 3 need, for every view."""

import inspect

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from common.networks.encoder import cls_and_patches
from common.networks.pretraining_model import (
    AuxiliaryHead,
    PretrainingModel,
    ProjectionHead,
    clip_by_global_norm,
    distribute,
    gradients_stay_here,
    peak_bf16_flops,
    start_from_timm,
    training_flops,
)
from tests.common.conftest import tiny_vit


def model(auxiliary: bool) -> PretrainingModel:
    vit = tiny_vit(img_size=32, embed_dim=12, depth=1, init_values=None)
    return PretrainingModel(
        vit, ProjectionHead(12, 17, 11), auxiliary_head() if auxiliary else None, False
    ).eval()


def auxiliary_head(embed_dim: int = 12, num_ts_classes: int = 7, num_rex_classes: int = 5) -> AuxiliaryHead:
    return AuxiliaryHead(
        embed_dim, num_ts_classes, num_rex_classes, train_auxiliary_head=True, prior_logits=None
    )


def test_every_view_is_projected_and_read_out_alone():
    net = model(auxiliary=True)
    views = {"global": torch.randn(3, 2, 1, 24, 24), "local": torch.randn(3, 4, 1, 16, 16)}
    output = net(views["global"], views["local"])
    assert output["projections"].shape == (6, 3, 11)
    assert output["cls"].shape == (3, 2, 12)
    slots = [("global", 0), ("global", 1), ("local", 0), ("local", 1), ("local", 2), ("local", 3)]
    for index, (group, view) in enumerate(slots):
        for slab in range(3):
            image = views[group][slab, view][None]
            tokens = net.encoder.forward_features(image)
            projection = net.projector(tokens[:, 0])[0]
            torch.testing.assert_close(output["projections"][index, slab], projection, rtol=1e-4, atol=1e-5)
            patches = net.auxiliary_head(tokens[:, 1:])
            torch.testing.assert_close(
                output["logits"][group]["ts_patch"][slab, view], patches["ts"][0], rtol=1e-4, atol=1e-5
            )
            cls = net.auxiliary_head(tokens[:, 0])
            torch.testing.assert_close(
                output["logits"][group]["rex_cls"][slab, view], cls["rex"][0], rtol=1e-4, atol=1e-5
            )


def test_every_parameter_gets_a_gradient_the_auxiliary_head_too():
    net = model(auxiliary=True).train()
    output = net(torch.randn(2, 2, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))
    logits = [tensor.sum() for group in output["logits"].values() for tensor in group.values()]
    # LayerNorm before the last Linear makes plain sums of projections flat, hence the square
    (output["projections"].square().sum() + sum(logits)).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
    assert net.auxiliary_head.readouts["ts"].weight.grad.abs().sum() > 0


def test_without_auxiliary_head_there_are_no_logits():
    output = model(auxiliary=False)(torch.randn(2, 2, 1, 16, 16), torch.randn(2, 3, 1, 8, 8))
    assert output["logits"] == {}


def test_projection_head_is_three_linear_layers_with_layer_norm_and_gelu_between() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(embed_dim=5, projector_hidden_dim=11, projection_dim=3).double()
    tokens = torch.randn(7, 5, dtype=torch.float64)
    parameters = list(head.parameters())
    hidden = tokens
    for weight, bias, scale, shift in (parameters[0:4], parameters[4:8]):
        hidden = functional.gelu(functional.layer_norm(hidden @ weight.T + bias, (11,), scale, shift))
    torch.testing.assert_close(head(tokens), hidden @ parameters[8].T + parameters[9])
    assert len(parameters) == 10


def test_auxiliary_head_reads_cls_and_patches_with_the_same_linear_layer_for_each_source() -> None:
    torch.manual_seed(0)
    head = auxiliary_head(5, 7, 3)
    tokens = torch.randn(2, 11, 5)
    patches = head(tokens)
    assert {source: tuple(logits.shape) for source, logits in patches.items()} == {
        "ts": (2, 11, 7),
        "rex": (2, 11, 3),
    }
    for source, logits in head(tokens[:, 4]).items():
        torch.testing.assert_close(logits, patches[source][:, 4])
    first, second = tokens  # an affine map of their sum is the sum of its values less its value at 0
    for source in patches:
        bend = head(first + second)[source] - head(first)[source] - head(second)[source]
        torch.testing.assert_close(bend, -head(torch.zeros(11, 5))[source])


def test_auxiliary_head_without_findings_has_no_parameter_for_them() -> None:
    head = auxiliary_head(5, 7, 0)
    assert head(torch.zeros(2, 5)).keys() == {"ts"}
    assert sum(parameter.numel() for parameter in head.parameters()) == 5 * 7 + 7


@pytest.mark.parametrize(
    ("head", "name"),
    [
        *((ProjectionHead, name) for name in ("embed_dim", "projector_hidden_dim", "projection_dim")),
        *((auxiliary_head, name) for name in ("embed_dim", "num_ts_classes", "num_rex_classes")),
    ],
)
def test_heads_without_width_are_refused(head, name: str) -> None:
    sizes = dict.fromkeys(inspect.signature(head).parameters, 3) | {name: -1}
    with pytest.raises(ValueError, match=rf"{name} must .*got -1\."):
        head(**sizes)


def network(checkpoint_activations: bool = False) -> PretrainingModel:
    return PretrainingModel(tiny_vit(), ProjectionHead(16, 9, 7), None, checkpoint_activations)


def gradients(model: PretrainingModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(3, n, 1, size, size, generator=generator) for n, size in ((2, 16), (4, 8))]
    views = [view.to(next(model.parameters())) for view in views]
    model(*views)["projections"].square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def spread(model: PretrainingModel, **changes) -> PretrainingModel:
    options = {"sharding": "ddp", "compiled": False, "device": torch.device("cpu")}
    return distribute(network=model, blocks=model.encoder.blocks, **options | changes)


def test_attention_and_patches_of_a_cpu_are_the_sums_of_the_plain_network():
    ours, plain = spread(network()).double(), network().double()
    assert not ours.encoder.blocks[0].attn.fused_attn
    assert type(ours.encoder.patch_embed.proj) is not type(plain.encoder.patch_embed.proj)
    found, expected = gradients(ours), gradients(plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_without_a_graph_break_under_the_same_names():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = spread(network(), compiled=True)
    found, expected = gradients(compiled), gradients(network())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch._dynamo.utils.counters["graph_break"]
    # two sizes of view, and no compilation for each of the blocks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert compiled.state_dict().keys() == network().state_dict().keys()


def test_checkpointed_activations_give_the_same_gradient():
    found, expected = gradients(network(checkpoint_activations=True)), gradients(network())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


def test_one_rank_needs_no_wrapping():
    model = network()
    assert spread(model) is model
    with gradients_stay_here(model, unless=False):
        pass


def test_gradients_are_scaled_to_the_largest_norm_and_no_further():
    model = torch.nn.Linear(1, 2, bias=False)
    model.weight.grad = torch.tensor([[3.0], [4.0]])
    assert clip_by_global_norm(model, 10.0) == 5
    assert model.weight.grad.tolist() == [[3.0], [4.0]]
    assert clip_by_global_norm(model, 1.0) == 5
    assert model.weight.grad.flatten().tolist() == pytest.approx([0.6, 0.8])


def test_another_sharding_is_refused():
    with pytest.raises(ValueError, match=r"sharding must be one of \('ddp', 'fsdp2'\), got 'zero'"):
        spread(network(), sharding="zero")


def test_a_network_that_does_not_learn_is_left_as_it_is():
    teacher = network().requires_grad_(False)
    assert spread(teacher) is teacher


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_large_patch14_dinov2", {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}),
        ("vit_base_patch14_reg4_dinov2", {"patch_size": 14, "depth": 1}),
        ("vit_giant_patch14_dinov2", {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    ],
    ids=["tiny", "registers", "SwiGLU"],
)
def test_the_count_is_three_times_torchs_own_count_of_a_forward_pass(name, options):
    encoder = timm.create_model(
        name, in_chans=1, num_classes=0, dynamic_img_size=True, img_size=56, **options
    )
    expected = 0
    for size_px, views in {56: 2, 112: 3}.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.zeros(views, 1, size_px, size_px))
        expected += 3 * counter.get_total_flops()
    assert training_flops(encoder, {56: 2, 112: 3}) == expected


def test_a_cpu_has_no_stated_peak():
    assert peak_bf16_flops(torch.device("cpu")) is None


def test_a_gpu_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_bf16_flops(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce 8800")
    assert peak_bf16_flops(torch.device("cuda")) is None


def test_no_source_leaves_the_random_weights():
    encoder = tiny_vit()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert start_from_timm(encoder, "vit_small_patch14_dinov2", None) is encoder
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_initial_weights_that_are_not_there_are_named():
    with pytest.raises(FileNotFoundError, match="must be 'hub' or a file of timm's weights, got 'nowhere'"):
        start_from_timm(tiny_vit(), "vit_small_patch14_dinov2", "nowhere")


DINOV2 = "vit_large_patch14_reg4_dinov2.lvd142m"
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 56, "num_classes": 0}


def published_weights(folder):
    """A small network of the published architecture, saved under the published keys."""
    torch.manual_seed(3)
    published = timm.create_model(DINOV2, **SMALL).eval()
    save_file(published.state_dict(), folder / "dinov2.safetensors")
    return published, folder / "dinov2.safetensors"


def test_one_channel_gives_what_a_grey_image_in_three_channels_gives(tmp_path):
    published, path = published_weights(tmp_path)
    assert {"cls_token", "reg_token", "pos_embed", "blocks.1.ls2.gamma", "norm.bias"} <= load_file(
        path
    ).keys()
    encoder = timm.create_model(DINOV2, in_chans=1, dynamic_img_size=True, **SMALL).eval()
    start_from_timm(encoder, DINOV2, path)
    grey = torch.randn(2, 1, 28, 42)
    expected = timm.create_model(DINOV2, dynamic_img_size=True, **SMALL).eval()
    expected.load_state_dict(published.state_dict())
    for found, wanted in zip(
        cls_and_patches(encoder, grey), cls_and_patches(expected, grey.expand(-1, 3, -1, -1)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_not_timms_cannot_start_from_its_weights(tmp_path):
    _, path = published_weights(tmp_path)
    shallow = timm.create_model(DINOV2, in_chans=1, **SMALL | {"depth": 1})
    with pytest.raises(ValueError, match=f"not timm's '{DINOV2}'.*depth"):
        start_from_timm(shallow, DINOV2, path)


def test_without_file_and_without_hub_the_error_says_which_weights_are_missing():
    encoder = timm.create_model(DINOV2, in_chans=1, **SMALL)
    with pytest.raises(FileNotFoundError, match=f"'{DINOV2}'.*'hub'.*Go online"):
        start_from_timm(encoder, DINOV2, "hub")  # conftest keeps tests offline
