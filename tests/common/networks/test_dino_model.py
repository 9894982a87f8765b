"""Student and teacher: what they encode, what the mask hides, and how the teacher follows."""

import pytest
import timm
import torch

from common.networks.dino_model import DINOModel, follow, new_teacher
from common.networks.encoder import cls_and_patches
from common.networks.pretraining_model import DINOHead

B, VG, VL, P = 3, 2, 4, 4
PLACES = torch.tensor([1, 5, 22, 0])


def model(registers: str = "vit_large_patch14_reg4_dinov2", **options) -> DINOModel:
    torch.manual_seed(0)
    vit = timm.create_model(
        registers,
        **{"in_chans": 1, "num_classes": 0, "dynamic_img_size": True, "img_size": 32, "patch_size": 8},
        **{"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1},
    )
    network = DINOModel(vit, DINOHead(16, 9, 6, 11), DINOHead(16, 9, 6, 11), **options)
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
