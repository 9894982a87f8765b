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
    PatchMaps,
    cls_attention,
    cls_attention_maps,
    encode,
    open_slice_encoder,
    read_images,
    slices_to_show,
    spread_slices,
)
from common.transforms.hounsfield import normalize_hu
from common.transforms.slice_strategies import SliceStrategy

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


SIDE, BOX = 60, (6, 15, 30)  # top, left, side


@pytest.fixture
def encoder(open_small: Callable[..., EncoderBundle]) -> EncoderBundle:
    """A ViT whose heads attend, to patches of 8 px."""
    return attentive(open_small())


def attentive(encoder: EncoderBundle) -> EncoderBundle:
    with torch.no_grad():
        encoder.network.blocks[-1].attn.qkv.weight.mul_(60)
    return encoder


def slices(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 500, (count, SIDE, SIDE)).astype(np.int16)


def maps_of(encoder: EncoderBundle, name: str, hu: np.ndarray, box: tuple[int, int, int] = BOX) -> PatchMaps:
    return cls_attention_maps(encoder, SliceStrategy(name, 8), hu, box)


def shares_of(encoder: EncoderBundle, images: torch.Tensor) -> np.ndarray:
    """Softmax of the CLS query on all keys, written out; ``(S, G, G)``."""
    block, seen = encoder.network.blocks[-1], {}
    handle = block.attn.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
    with torch.no_grad():
        encoder.network.forward_features(normalize_hu(images, encoder.window))
        handle.remove()
        query, key, _ = block.attn.qkv(seen["tokens"]).chunk(3, dim=-1)
    heads = []
    for q, k in zip(query[:, 0].split(8, -1), key.split(8, -1), strict=True):
        heads.append(torch.softmax(torch.einsum("sd,std->st", q, k) / 8**0.5, -1)[:, 1:])
    grid = int(heads[0].shape[1] ** 0.5)
    return torch.stack(heads).mean(0).unflatten(1, (grid, grid)).numpy()


def test_maps_are_the_share_above_even_on_one_scale(encoder: EncoderBundle) -> None:
    hu = slices(35)  # more than a batch
    maps = maps_of(encoder, "cropped_32", hu)
    strategy = SliceStrategy("cropped_32", 8)
    shares = shares_of(encoder, strategy(torch.from_numpy(hu[:, 6:36, 15:45])))
    full = np.quantile(shares, 0.99)
    assert full > 2 / 16  # or the floor would hide what is tested
    expected = np.clip((shares - 1 / 16) / (full - 1 / 16), 0, 1)
    np.testing.assert_allclose(maps.values, expected, atol=1e-4)
    assert maps.box == (15 / 60, 6 / 60, 30 / 60, 30 / 60)  # left first
    assert "No colour: 6.25%" in maps.note
    assert f"full colour: {full:.2%}" in maps.note


def test_whole_slices_are_covered_whole_and_sides_are_the_strategys(encoder: EncoderBundle) -> None:
    whole = (0, 0, SIDE)
    raw = maps_of(encoder, "raw_32", slices(2), whole)
    assert raw.values.shape == (2, 4, 4)
    assert raw.box == (0, 0, 1, 1)
    assert maps_of(encoder, "raw_full", slices(2), whole).values.shape == (2, 7, 7)  # 56 of 60 px
    assert maps_of(encoder, "cropped_full", slices(2)).values.shape == (2, 3, 3)  # 24 of 30 px


def test_attention_that_is_even_has_no_colour(encoder: EncoderBundle) -> None:
    with torch.no_grad():
        encoder.network.blocks[-1].attn.qkv.weight.zero_()
    maps = maps_of(encoder, "raw_32", slices(3), (0, 0, SIDE))
    np.testing.assert_array_equal(maps.values, 0)
    assert "full colour: 12.50% or more" in maps.note


def test_an_encoder_that_sees_slices_transposed_gives_upright_maps(
    encoder: EncoderBundle, open_small: Callable[..., EncoderBundle]
) -> None:
    hu, whole = slices(2), (0, 0, SIDE)
    upright = maps_of(encoder, "raw_32", hu, whole)
    turned = maps_of(attentive(open_small(slice_axes="xy")), "raw_32", hu.transpose(0, 2, 1).copy(), whole)
    np.testing.assert_allclose(turned.values, upright.values.transpose(0, 2, 1), atol=1e-5)
