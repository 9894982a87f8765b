"""Student and teacher: what they encode, what the mask hides, and how the teacher follows."""

import pytest
import torch
from torch.nn import functional

from common.networks.dino_model import DINOHead, DINOModel, follow, new_teacher
from common.networks.encoder import cls_and_patches
from tests.common.conftest import tiny_vit

B, VG, VL, P = 3, 2, 4, 4
PLACES = torch.tensor([1, 5, 22, 0])


def model(name: str = "vit_large_patch14_reg4_dinov2", checkpoint_activations: bool = False) -> DINOModel:
    heads = [DINOHead(16, 9, 6, 11) for _ in range(2)]
    network = DINOModel(tiny_vit(name, img_size=32), *heads, checkpoint_activations)
    torch.nn.init.normal_(network.mask_token)
    return network


def views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(B, n, 1, size, size, generator=generator) for n, size in ((VG, 16), (VL, 8)))
    return first, second


def masks() -> torch.Tensor:
    chosen = torch.zeros(B * VG * P, dtype=torch.bool)
    chosen[PLACES[:3]] = True
    return chosen.view(B, VG, P)


@pytest.mark.parametrize("registers", ["vit_large_patch14_reg4_dinov2", "vit_large_patch14_dinov2"])
def test_without_masks_tokens_are_those_of_timm(registers):
    network, images = model(registers), torch.randn(3, 1, 16, 24)
    found = network.tokens(images, None)
    torch.testing.assert_close(found, network.encoder.forward_features(images), rtol=1e-5, atol=1e-5)


def test_each_head_reads_its_tokens_view_by_view():
    network, (global_views, local_views) = model(), views()
    output = network(global_views, local_views, None, PLACES)
    assert output["cls_logits"].shape == (VG + VL, B, 11)
    for view in range(VG + VL):
        for sample in range(B):
            image = (global_views[sample, view] if view < VG else local_views[sample, view - VG])[None]
            cls, patches = cls_and_patches(network.encoder, image)
            expected = network.dino_head(cls)[0]
            torch.testing.assert_close(output["cls_logits"][view, sample], expected, rtol=1e-4, atol=1e-5)
            if view < VG:
                torch.testing.assert_close(output["cls"][sample, view], cls[0], rtol=1e-4, atol=1e-5)
                for row, place in enumerate(PLACES.tolist()):
                    if place // P == sample * VG + view:
                        logits = network.ibot_head(patches[0, place % P])
                        torch.testing.assert_close(output["patch_logits"][row], logits, rtol=1e-4, atol=1e-5)


def test_a_masked_patch_is_not_seen_and_its_place_is():
    network, (global_views, _) = model(), views()
    changed = global_views.clone()
    changed[0, 0, :, :8, 8:] = 5  # patch 1 of the first view, the first of PLACES
    one, other = (network(images, None, masks(), PLACES) for images in (global_views, changed))
    torch.testing.assert_close(one["patch_logits"], other["patch_logits"], rtol=0, atol=0)
    torch.testing.assert_close(one["cls_logits"], other["cls_logits"], rtol=0, atol=0)
    seen = (
        network(changed, None, None, PLACES)["cls_logits"]
        - network(global_views, None, None, PLACES)["cls_logits"]
    )
    assert seen[0, 0].abs().max() > 1e-4
    # two masked patches of one view differ by their positions alone
    both = torch.zeros(B, VG, P, dtype=torch.bool)
    both[0, 0, :2] = True
    tokens = network.tokens(global_views.flatten(0, 1), both.flatten(0, 1))[0, 5:7]
    assert not torch.allclose(tokens[0], tokens[1])


def test_every_parameter_of_the_student_learns_also_with_checkpointed_activations():
    gradients = []
    for options in ({}, {"checkpoint_activations": True}):
        network = model(**options)
        output = network(*views(), masks(), PLACES)
        (output["cls_logits"].square().sum() + output["patch_logits"].square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_teacher_is_a_copy_that_does_not_learn():
    student = model()
    teacher = new_teacher(student)
    with torch.no_grad():
        student.mask_token += 1
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not torch.equal(teacher.mask_token, student.mask_token)
    assert torch.equal(teacher.encoder.cls_token, student.encoder.cls_token)


def test_after_n_steps_the_teacher_is_the_weighted_sum_of_all_students():
    student = model().double()
    teacher = new_teacher(student)
    momenta, weight = [0.9, 0.5, 0.75, 0.99], student.encoder.blocks[1].mlp.fc1.weight
    history = [weight.detach().clone()]
    for momentum in momenta:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += torch.randn_like(parameter)
        history.append(weight.detach().clone())
        follow(teacher, student, momentum)
    # m1 m2 m3 m4 s0 + (1 - m1) m2 m3 m4 s1 + ... + (1 - m4) s4
    expected = 0.9 * 0.5 * 0.75 * 0.99 * history[0]
    expected += 0.1 * 0.5 * 0.75 * 0.99 * history[1] + 0.5 * 0.75 * 0.99 * history[2]
    expected += 0.25 * 0.99 * history[3] + 0.01 * history[4]
    torch.testing.assert_close(teacher.encoder.blocks[1].mlp.fc1.weight, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(student.encoder.blocks[1].mlp.fc1.weight, history[4], rtol=0, atol=0)


def test_dino_head_is_the_cosine_of_the_angle_to_each_prototype() -> None:
    torch.manual_seed(0)
    head = DINOHead(embed_dim=5, head_hidden_dim=11, head_bottleneck_dim=4, num_prototypes=7).double()
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
    head = DINOHead(embed_dim=64, head_hidden_dim=128, head_bottleneck_dim=32, num_prototypes=512)
    weights = torch.cat([weight.flatten() for weight in head.parameters() if weight.ndim > 1])
    assert float(weights.detach().std()) == pytest.approx(0.02 * 0.88, rel=0.02)  # of a normal cut off at two
    assert float(weights.detach().abs().max()) <= 0.04
    assert all((weight == 0).all() for weight in head.parameters() if weight.ndim == 1)


def test_dino_head_without_prototypes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_prototypes must be positive, got 0"):
        DINOHead(5, 11, 4, 0)
