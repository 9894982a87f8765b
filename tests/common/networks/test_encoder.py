"""Encoder weights travel with the facts they depend on."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.networks.encoder import (
    SlicesInferer,
    Weights,
    cls_and_patches,
    encoder_id,
    load_encoder,
    load_strictly,
    save_encoder,
    slice_input,
)
from common.transforms.hounsfield import hu_window
from tests.common.conftest import tiny_vit

IDENTITY = {"patch_size_px": 8, "slice_axes": "yx"}


def weights(**facts: Any) -> Weights:
    """Weights of which this is known."""
    return Weights(Path("model.safetensors"), "theirs", "0" * 64, facts)


def test_cls_and_patches_are_the_tokens_after_the_final_norm_in_row_major_order():
    torch.manual_seed(0)
    vit = tiny_vit().eval()
    images = torch.randn(3, 1, 16, 24)
    cls, patches = cls_and_patches(vit, images)
    assert cls.shape == (3, 16)
    assert patches.shape == (3, 2 * 3, 16)
    torch.testing.assert_close(cls, vit(images), rtol=1e-4, atol=1e-4)  # timm's own pooled output
    tokens = vit.norm(vit.forward_intermediates(images, norm=False, intermediates_only=False)[0])
    torch.testing.assert_close(patches, tokens[:, 1:], rtol=1e-4, atol=1e-4)


def test_saved_weights_have_plain_timm_keys_and_load_into_the_same_tokens(tmp_path):
    torch.manual_seed(0)
    trained, fresh = tiny_vit().eval(), tiny_vit().eval()
    path = tmp_path / "models" / "model.safetensors"
    save_encoder(trained.state_dict(), path, IDENTITY)
    assert load_file(path).keys() == trained.state_dict().keys()
    images = torch.randn(2, 1, 16, 16)
    load_encoder(fresh, path, IDENTITY)
    torch.testing.assert_close(fresh(images), trained(images), rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_weights_of_the_networks_type_are_taken_without_a_copy_and_others_converted():
    trained, fresh, half = tiny_vit(), tiny_vit(), tiny_vit().half()
    load_strictly(fresh, trained.state_dict(), "a")
    assert all(
        ours.data_ptr() == theirs.data_ptr()
        for ours, theirs in zip(fresh.parameters(), trained.parameters(), strict=True)
    )
    assert all(weight.requires_grad for weight in fresh.parameters())
    load_strictly(fresh, half.state_dict(), "b")
    assert {weight.dtype for weight in fresh.parameters()} == {torch.float32}
    torch.testing.assert_close(fresh.norm.weight, half.norm.weight.float())


def test_weights_for_another_input_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_encoder(tiny_vit().state_dict(), path, IDENTITY)
    with pytest.raises(ValueError, match=r"slice_axes of '.*'xy'.* got 'yx'"):
        load_encoder(tiny_vit(), path, {"slice_axes": "xy"})
    with pytest.raises(ValueError, match=r"model\.safetensors.*\b16\b.*\b14\b"):
        load_encoder(tiny_vit(embed_dim=14), path, IDENTITY)


WINDOW = [-940.8, 923.1, -25.03, 246.87]


@pytest.mark.parametrize("window", [WINDOW, "dale_ct_0_l"])
def test_what_is_known_of_weights_decides_which_slices_they_are_shown(window):
    known = weights(slice_axes="xy", hu_window=window)
    expected = ("xy", (-940.8, 923.1, -25.03, 246.87))
    assert slice_input(known) == slice_input(known, "xy", "dale_ct_0_l") == expected
    with pytest.raises(ValueError, match="slice_axes .*'xy' as 'theirs'.*'yx'. Drop --slice_axes"):
        slice_input(known, slice_axes="yx")
    with pytest.raises(ValueError, match=r"hu_window .*-940.8.*\[-997.*Drop --hu_window"):
        slice_input(known, window="ct_rate")


def test_what_nobody_knows_must_be_given():
    assert slice_input(weights(), "xy", WINDOW) == ("xy", tuple(WINDOW))
    with pytest.raises(ValueError, match="'theirs' does not state its slice_axes. Pass --slice_axes"):
        slice_input(weights(), window=WINDOW)
    with pytest.raises(ValueError, match="'theirs' does not state its hu_window. Pass --hu_window"):
        slice_input(weights(), "xy")


def test_random_weights_are_shown_the_papers_slices_unless_told():
    random = Weights(None, "random", None, {})
    assert slice_input(random) == ("yx", (-997.0, 888.0, -142.39, 360.97))
    assert slice_input(random, "xy", [-1000, 1000, 0, 500]) == ("xy", (-1000, 1000, 0, 500))


def test_missing_and_extra_keys_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = dict(tiny_vit().state_dict())
    tensors["extra"] = tensors.pop("norm.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r'Missing.*"norm.bias".*Unexpected.*"extra"'):
        load_encoder(tiny_vit(), path, {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_encoder(tiny_vit(), tmp_path / "none.safetensors", {})


def test_null_keeps_random_weights_and_says_so(caplog):
    vit = tiny_vit()
    assert load_encoder(vit, None, {}) is vit
    assert "random initial weights" in caplog.text


def test_encoder_id_follows_the_bytes_and_the_kind_of_slices():
    digest = hashlib.sha256(b"abc").hexdigest()
    assert encoder_id(digest, seed=0) == "sha256:ba7816bf8f01cfea"  # FIPS 180-2's own example
    assert encoder_id(digest, seed=0, slice_axes="xy", layer_scale_init=1) == "sha256:ba7816bf8f01cfea:xy"
    assert encoder_id(None, seed=7) == encoder_id(None, seed=7, window=hu_window("ct_rate")) == "random:7"
    assert encoder_id(None, seed=7, layer_scale_init=0.5) == "random:7:layer_scale=0.5"
    wide = hu_window([-1000, 1000, 0, 500.5])
    assert encoder_id(None, seed=7, slice_axes="xy", window=wide) == "random:7:xy:-1000.0,1000.0,0.0,500.5"


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    return tiny_vit("vit_large_patch14_reg4_dinov2", img_size=32, embed_dim=24).eval()


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


def test_a_batch_too_large_for_the_gpu_goes_in_parts_from_then_on(encoder, caplog):
    images = torch.randn(7, 1, 32, 32)
    infer = SlicesInferer("float32", compiled=False, patch_tokens=True)
    cls, patches = infer(images, encoder)
    tried = []

    def forward(part, at_most):
        tried.append(len(part))
        if len(part) > at_most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    hook = encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: forward(inputs[0], 2))
    for _ in range(2):
        torch.testing.assert_close(infer(images, encoder), (cls, patches), rtol=1e-5, atol=1e-5)
    hook.remove()
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1, *[1] * 7]
    assert [record.args for record in caplog.records] == [(7, 1)]
    hook = encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: forward(inputs[0], 0))
    with pytest.raises(ValueError, match=r"cpu.*\(1, 32, 32\).*3 GiB.*--device"):
        infer(images, encoder)
    hook.remove()
