"""One forward gives what Eq. 1 to 3 need, for every view."""

import pytest
import timm
import torch
from torch.nn import functional

from common.networks.pretraining_model import (
    AuxiliaryHead,
    DINOHead,
    PretrainingModel,
    ProjectionHead,
    clip_by_global_norm,
    distribute,
    gradients_stay_here,
)


def model(auxiliary: bool) -> PretrainingModel:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch14_dinov2",
        in_chans=1,
        num_classes=0,
        dynamic_img_size=True,
        img_size=32,
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=2,
    )
    head = AuxiliaryHead(embed_dim=12, num_ts_classes=7, num_rex_classes=5) if auxiliary else None
    return PretrainingModel(vit, ProjectionHead(embed_dim=12, hidden_dim=17, out_dim=11), head).eval()


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
    head = ProjectionHead(embed_dim=5, hidden_dim=11, out_dim=3).double()
    tokens = torch.randn(7, 5, dtype=torch.float64)
    parameters = list(head.parameters())
    hidden = tokens
    for weight, bias, scale, shift in (parameters[0:4], parameters[4:8]):
        hidden = functional.gelu(functional.layer_norm(hidden @ weight.T + bias, (11,), scale, shift))
    torch.testing.assert_close(head(tokens), hidden @ parameters[8].T + parameters[9])
    assert len(parameters) == 10


def test_projection_head_of_the_paper_has_its_widths() -> None:
    with torch.device("meta"):
        head = ProjectionHead(embed_dim=1024, hidden_dim=2048, out_dim=124)
    shapes = [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(2048, 1024), (2048, 2048), (124, 2048)]


def test_auxiliary_head_reads_cls_and_patches_with_the_same_linear_layer_for_each_source() -> None:
    torch.manual_seed(0)
    head = AuxiliaryHead(embed_dim=5, num_ts_classes=7, num_rex_classes=3)
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
    head = AuxiliaryHead(embed_dim=5, num_ts_classes=7, num_rex_classes=0)
    assert head(torch.zeros(2, 5)).keys() == {"ts"}
    assert sum(parameter.numel() for parameter in head.parameters()) == 5 * 7 + 7


def test_every_parameter_of_the_auxiliary_head_is_trained() -> None:
    head = AuxiliaryHead(embed_dim=5, num_ts_classes=7, num_rex_classes=3)
    sum(logits.square().sum() for logits in head(torch.randn(2, 5)).values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("name", ["embed_dim", "hidden_dim", "out_dim"])
def test_projection_heads_without_width_are_refused(name: str) -> None:
    sizes = {"embed_dim": 5, "hidden_dim": 11, "out_dim": 3, name: 0}
    with pytest.raises(ValueError, match=rf"{name} must be positive, got 0\."):
        ProjectionHead(**sizes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embed_dim", r"embed_dim must be positive, got -1\."),
        ("num_ts_classes", r"num_ts_classes must be positive, got -1\."),
        ("num_rex_classes", r"num_rex_classes must not be negative, got -1\."),
    ],
)
def test_auxiliary_heads_without_width_are_refused(name: str, message: str) -> None:
    sizes = {"embed_dim": 5, "num_ts_classes": 7, "num_rex_classes": 3, name: -1}
    with pytest.raises(ValueError, match=message):
        AuxiliaryHead(**sizes)


def test_dino_head_is_the_cosine_of_the_angle_to_each_prototype() -> None:
    torch.manual_seed(0)
    head = DINOHead(embed_dim=5, hidden_dim=11, bottleneck_dim=4, num_prototypes=7).double()
    tokens = torch.randn(3, 2, 5, dtype=torch.float64)
    layers = [layer for layer in head.mlp if isinstance(layer, torch.nn.Linear)]
    hidden = tokens
    for layer in layers[:2]:
        hidden = functional.gelu(hidden @ layer.weight.T + layer.bias)
    points = hidden @ layers[2].weight.T + layers[2].bias
    expected = functional.cosine_similarity(points[..., None, :], head.last_layer.weight, dim=-1)
    torch.testing.assert_close(head(tokens), expected)
    assert head.last_layer.bias is None
    assert len(list(head.parameters())) == 7


def test_dino_head_starts_from_a_narrow_cut_off_normal() -> None:
    torch.manual_seed(0)
    head = DINOHead(embed_dim=64, hidden_dim=128, bottleneck_dim=32, num_prototypes=512)
    weights = torch.cat([weight.flatten() for weight in head.parameters() if weight.ndim > 1])
    assert float(weights.detach().std()) == pytest.approx(0.02 * 0.88, rel=0.02)  # of a normal cut off at two
    assert float(weights.detach().abs().max()) <= 0.04
    assert all((weight == 0).all() for weight in head.parameters() if weight.ndim == 1)


def test_dino_head_without_prototypes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_prototypes must be positive, got 0"):
        DINOHead(5, 11, 4, 0)


def network(**options) -> PretrainingModel:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_large_patch14_dinov2",
        **{"in_chans": 1, "num_classes": 0, "dynamic_img_size": True, "img_size": 16, "patch_size": 8},
        **{"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1},
    )
    return PretrainingModel(vit, ProjectionHead(16, 9, 7), None, **options)


def gradients(model: PretrainingModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(3, n, 1, size, size, generator=generator) for n, size in ((2, 16), (4, 8))]
    model(*views)["projections"].square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def spread(model: PretrainingModel, **changes) -> PretrainingModel:
    options = {"sharding": "ddp", "compile_blocks": False, "device": torch.device("cpu")}
    return distribute(model, model.encoder.blocks, **options | changes)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_without_a_graph_break_under_the_same_names():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = spread(network(), compile_blocks=True)
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
