"""A map is the CLS attention above its even share, in its place in the slice."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.embeddings.encoder_bundle import EncoderBundle
from common.reports.patch_maps import PatchMaps, cls_attention_maps
from common.transforms.hounsfield import normalize_hu
from common.transforms.slice_strategies import SliceStrategy

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
