"""The seven strategies against float64 filters and cuts written out by hand, to a tenth of a HU of noise."""

import numpy as np
import pytest
import torch

from common.transforms.slice_strategies import STRATEGIES, SliceStrategy, slice_strategies


def slices(side: int, num_slices: int = 2) -> torch.Tensor:
    rng = np.random.default_rng(side)
    return torch.from_numpy(rng.integers(-1024, 1500, (num_slices, side, side)).astype(np.int16))


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """Area-true bilinear resize by a float64 matrix: a triangle as wide as the larger of both pixels."""
    side = len(image)
    reach = max(side / size, 1.0)
    distance = np.abs(np.arange(side) + 0.5 - (np.arange(size)[:, None] + 0.5) * side / size)
    weights = np.maximum(0.0, 1 - distance / reach)
    weights /= weights.sum(1, keepdims=True)
    return weights @ image @ weights.T


@pytest.mark.parametrize(
    ("name", "patch", "size"),
    [
        ("raw_144", 16, 144),
        ("raw_256", 16, 256),
        ("cropped_144", 16, 144),
        ("cropped_256", 16, 256),
        ("cropped_252", 14, 252),
        ("raw_full", 16, 320),
        ("cropped_full", 14, 322),
    ],
)
def test_one_image_a_slice_is_the_resized_region(name: str, patch: int, size: int) -> None:
    hu = slices(330)
    images = SliceStrategy(name, patch)(hu)
    assert images.shape == (2, 1, size, size)
    assert images.dtype == torch.float32
    for image, one in zip(images, hu, strict=True):
        np.testing.assert_allclose(image[0], resized(one.double().numpy(), size), atol=0.1)


@pytest.mark.parametrize(("patch", "tile"), [(16, 256), (14, 252)])
def test_tiles_are_the_quadrants_and_the_centre_of_twice_their_side(patch: int, tile: int) -> None:
    hu = slices(300)
    images = SliceStrategy("tiled_5cut", patch)(hu)
    assert images.shape == (10, 1, tile, tile)
    half = tile // 2
    for z in range(2):
        square = resized(hu[z].double().numpy(), 2 * tile)
        cuts = [
            *(square[:tile, :tile], square[:tile, tile:], square[tile:, :tile], square[tile:, tile:]),
            square[half : half + tile, half : half + tile],
        ]
        for image, cut in zip(images[5 * z : 5 * z + 5, 0], cuts, strict=True):
            np.testing.assert_allclose(image, cut, atol=0.1)


@pytest.mark.parametrize(
    ("side", "patch", "expected"),
    [(512, 16, 512), (512, 14, 504), (700, 16, 512), (511, 16, 496), (35, 16, 32), (9, 16, 16)],
)
def test_full_keeps_the_side_in_whole_patches_up_to_512(side: int, patch: int, expected: int) -> None:
    assert SliceStrategy("cropped_full", patch).side_px(side) == expected
    assert not SliceStrategy("raw_full", patch).is_fixed


def test_a_region_of_the_right_side_is_not_touched() -> None:
    hu = slices(64)
    assert torch.equal(SliceStrategy("raw_64", 16)(hu)[:, 0], hu.float())


def test_only_cropped_strategies_look_at_the_box() -> None:
    hu, box = slices(50), (3, 7, 40)
    for name in STRATEGIES:
        strategy = SliceStrategy(name, 16)
        region = strategy.region(hu, box)
        assert strategy.is_cropped == (not name.startswith("raw"))
        assert torch.equal(region, hu[:, 3:43, 7:47] if strategy.is_cropped else hu)


def test_tiles_become_features_or_items() -> None:
    cls = torch.arange(30.0).reshape(10, 3)  # 2 slices x 5 tiles, 3 wide
    features = SliceStrategy("tiled_5cut", 16)
    assert torch.equal(features.tokens(cls), torch.arange(30.0).reshape(2, 15))
    assert features.z_mm(torch.tensor([0.0, 2.5])).tolist() == [0, 2.5]
    items = SliceStrategy("tiled_5cut_items", 16)
    assert torch.equal(items.tokens(cls), cls)
    assert items.z_mm(torch.tensor([0.0, 2.5])).tolist() == [0] * 5 + [2.5] * 5
    one = SliceStrategy("cropped_256", 16)
    assert torch.equal(one.tokens(cls), cls)


@pytest.mark.parametrize("name", ["", "cropped", "cropped_0", "raw_full_144", "tiled_4cut", "Cropped_256"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"strategy must be one of .*, or raw_<px> .*, got '{name}'"):
        SliceStrategy(name, 16)


def test_a_side_of_no_whole_patches_is_refused() -> None:
    with pytest.raises(
        ValueError, match="a multiple of the patch's 14 px, got 'cropped_256'. Use cropped_252"
    ):
        SliceStrategy("cropped_256", 14)


def test_lists_of_strategies() -> None:
    assert [one.name for one in slice_strategies(["raw_144", "tiled_5cut"], 16)] == ["raw_144", "tiled_5cut"]
    for names in ([], ["raw_144", "raw_144"], "raw_144"):
        with pytest.raises(ValueError, match="strategies must be a list of names, each once, got"):
            slice_strategies(names, 16)
    with pytest.raises(ValueError, match="patch_tokens must be False for tiles, got True for 'tiled_5cut'"):
        slice_strategies(["raw_144", "tiled_5cut"], 16, patch_tokens=True)
