"""One encoder for a batch of images: CLS alone or with patches, compiled or not, all the same numbers."""

import copy
from typing import Any

import pytest
import timm
import torch

from common.inferers.slices import SlicesInferer


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model(
        "vit_large_patch14_reg4_dinov2", in_chans=1, num_classes=0, dynamic_img_size=True, **sizes
    ).eval()


@torch.no_grad()
def test_cls_and_patches_are_those_of_the_encoder(encoder: torch.nn.Module) -> None:
    images = torch.randn(3, 1, 32, 40)
    tokens = encoder.forward_features(images)
    cls, none = SlicesInferer("float32", compiled=False, patch_tokens=False)(images, encoder)
    torch.testing.assert_close(cls, tokens[:, 0])
    assert none is None
    cls, patches = SlicesInferer("float32", compiled=False, patch_tokens=True)(images, encoder)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 5:])  # after CLS and 4 registers
    assert patches.shape == (3, 4 * 5, 24)


@torch.no_grad()
def test_bfloat16_is_close_and_no_more(encoder: torch.nn.Module) -> None:
    images = torch.randn(3, 1, 32, 32)
    exact, _ = SlicesInferer("float32", compiled=False, patch_tokens=False)(images, encoder)
    rounded, _ = SlicesInferer("bfloat16", compiled=False, patch_tokens=False)(images, encoder)
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.05)
    assert not torch.equal(rounded.float(), exact)


@torch.no_grad()
def test_only_batches_of_a_fixed_shape_are_compiled_for(
    encoder: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def compile_(function, **options):
        assert options == {"dynamic": False}

        def compiled(network, images, patch_tokens):
            shapes.append(tuple(images.shape))
            return function(network, images, patch_tokens)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    inferer = SlicesInferer("float32", compiled=True, patch_tokens=False)
    eager = SlicesInferer("float32", compiled=False, patch_tokens=False)
    for side, is_fixed in ((32, True), (40, False)):
        images = torch.randn(2, 1, side, side)
        torch.testing.assert_close(inferer(images, encoder, is_fixed)[0], eager(images, encoder)[0])
    assert shapes == [(2, 1, 32, 32)]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_gives_the_same_without_a_break_in_the_graph(encoder: torch.nn.Module) -> None:
    images = torch.randn(2, 1, 32, 32)
    inferer = SlicesInferer("float32", compiled=True, patch_tokens=False)
    eager, _ = SlicesInferer("float32", compiled=False, patch_tokens=False)(images, encoder)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(inferer(images, encoder)[0], eager, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.explain(encoder)(images).graph_break_count == 0


@torch.no_grad()
def test_a_gpu_is_asked_for_no_value(encoder: torch.nn.Module, fake_gpu: Any) -> None:
    on_gpu = copy.deepcopy(encoder)
    fake_gpu.take(on_gpu)
    (images,) = fake_gpu.holds(torch.zeros(3, 1, 32, 40))
    with fake_gpu.mode:
        found = SlicesInferer("float32", compiled=False, patch_tokens=True)(images, on_gpu)
    assert [tuple(tokens.shape) for tokens in found] == [(3, 24), (3, 4 * 5, 24)]
    assert {tokens.device.type for tokens in found} == {"cuda"}
