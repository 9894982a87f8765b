"""Slices and tokens lie upright, whatever the encoder was shown."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.embeddings.encoder_bundle import EncoderBundle
from common.networks.encoder import save_encoder
from common.reports.ct_tokens import (
    cls_attention,
    encode,
    open_slice_encoder,
    read_images,
    slices_to_show,
    spread_slices,
)
from common.transforms.hounsfield import normalize_hu

pytestmark = pytest.mark.usefixtures("any_values")


def test_slices_are_cropped_and_shown_the_radiological_way(ct_path: Path) -> None:
    images = read_images(ct_path, 32)
    assert images.name == "scan_1"
    assert images.hu.shape == (9, 1, 32, 32)
    np.testing.assert_allclose(images.z_mm, np.arange(9) * 2.5)
    bright = (images.hu[4, 0] > 700).nonzero().float().mean(0)
    assert bright[0] < 16
    assert bright[1] < 16  # the patient's right is on the left
    assert images.box[2] < 60
    some = images.some([7, 2])
    assert some.titles == ["slice 7, 18 mm", "slice 2, 5 mm"]
    torch.testing.assert_close(some.hu[1], images.hu[2])


def test_tokens_lie_upright_whatever_the_encoder_was_shown(
    ct_path: Path, open_small: Callable[..., EncoderBundle]
) -> None:
    encoder = open_small()
    hu = read_images(ct_path, encoder.side_px).hu
    cls, patches = encode(encoder, hu)
    assert (cls.shape, patches.shape) == ((9, 24), (9, 4, 4, 24))
    turned_cls, turned = encode(open_small(slice_axes="xy"), hu.mT)
    torch.testing.assert_close(turned_cls, cls)
    torch.testing.assert_close(turned.transpose(1, 2), patches)
    maps = cls_attention(encoder, hu)
    torch.testing.assert_close(cls_attention(open_small(slice_axes="xy"), hu.mT).mT, maps)


def test_pictures_show_an_encoder_the_slices_that_its_weights_state(
    tmp_path: Path, bundle: Path, open_small: Callable[..., EncoderBundle]
) -> None:
    encoder = open_small()
    assert encoder.slice_axes == "yx"
    identity = {"slice_axes": "xy", "hu_window": [-940.8, 923.1, -25.03, 246.87]}
    save_encoder(encoder.network.state_dict(), tmp_path / "model.safetensors", identity)
    stated = open_slice_encoder(bundle, tmp_path / "model.safetensors", [tmp_path / "small.json"])
    assert stated.slice_axes == "xy"
    assert stated.window == (-940.8, 923.1, -25.03, 246.87)


def test_attention_reproduces_what_the_last_block_does(
    ct_path: Path, open_small: Callable[..., EncoderBundle]
) -> None:
    encoder = open_small()
    hu = read_images(ct_path, 32).hu[:3]
    maps = cls_attention(encoder, hu)
    assert maps.shape == (3, 3, 4, 4)
    # the block's own output for CLS is the same mean of its values
    block, seen = encoder.network.blocks[-1].attn, {}
    block.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs[0], output=output))
    with torch.no_grad():
        encoder.network.forward_features(normalize_hu(hu, encoder.window))
        values = block.qkv(seen["inputs"]).unflatten(-1, (3, 3, 8))[:, :, 2]  # (S, T, N, 8)
        weights = torch.cat([1 - maps.flatten(2).sum(-1, keepdim=True), maps.flatten(2)], -1)
        mixed = torch.einsum("snt,stnd->snd", weights, values).flatten(1)
        torch.testing.assert_close(block.proj(mixed), seen["output"][:, 0], rtol=1e-4, atol=1e-5)


def test_images_are_the_crop_that_is_embedded(ct_path: Path) -> None:
    whole = read_images(ct_path, 60)
    top, left, side = whole.box
    assert whole.hu.shape[-1] == 60
    small = F.interpolate(whole.hu, (20, 20), mode="area")
    assert (small - read_images(ct_path, 20).hu).abs().median() < 30
    assert 40 <= side <= 44  # the body is 41 px square
    assert top + side <= 60
    assert left + side <= 60


def test_bundles_and_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, bundle: Path, open_small: Callable[..., EncoderBundle]
) -> None:
    assert open_small(strategies=["cropped_24"]).side_px == 24
    small = [tmp_path / "small.json"]
    assert open_slice_encoder(bundle, "random", small, 40).side_px == 40
    with pytest.raises(ValueError, match="8 px, got 'cropped_30'"):
        open_slice_encoder(bundle, "random", small, 30)
    with pytest.raises(ValueError, match="merlin"):
        open_slice_encoder(bundle.with_name("merlin"), "random")
    network = {"_target_": "timm.create_model", "model_name": "resnet10t", "in_chans": 1, "num_classes": 0}
    with pytest.raises(ValueError, match="got ResNet"):
        open_small(network_def=network)


def test_a_path_must_be_one_volume(ct_path: Path) -> None:
    ct_path.with_name("scan_2.nii.gz").write_bytes(ct_path.read_bytes())
    with pytest.raises(ValueError, match=r"got 2 in .*scan_1"):
        read_images(ct_path.parent, 32)


def test_spread_slices_keep_off_the_ends() -> None:
    assert spread_slices(9, 3) == [1, 4, 7]
    assert spread_slices(2, 5) == [0, 1]


def test_slices_asked_for_must_be_there() -> None:
    assert slices_to_show([3, 0], 4, 2) == [3, 0]
    assert slices_to_show(None, 9, 3) == slices_to_show([], 9, 3) == [1, 4, 7]
    for place in (-1, 4):
        with pytest.raises(ValueError, match=rf"slices must be 0 to 3 in this scan, got {place}\."):
            slices_to_show([0, place], 4, 2)
