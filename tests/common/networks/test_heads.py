"""Heads against their layers written out."""

import pytest
import torch
from torch.nn import functional

from common.networks.heads import AuxiliaryHead, DINOHead, ProjectionHead


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
