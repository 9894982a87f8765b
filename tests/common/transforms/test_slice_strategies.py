"""The seven strategies against float64 filters and cuts written out by hand, to a tenth of a HU of noise."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from common.transforms import slice_strategies as slice_strategies_module
from common.transforms.slice_strategies import (
    BITS,
    STRATEGIES,
    SliceStrategy,
    body_box,
    pad_to_square,
    slice_strategies,
)


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
    with pytest.raises(ValueError, match=rf"strategy .*raw_<px>.* got '{name}'"):
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


AIR, TISSUE = -1000, 40


def box_by_opening(hu: np.ndarray, threshold_hu: float, opening_px: int) -> tuple[int, int, int]:
    """Open every slice with a full square, take the union, its bounding box, and make that square inside."""
    square = np.ones((opening_px, opening_px), bool)
    union = np.zeros(hu.shape[1:], bool)
    for mask in hu > threshold_hu:
        eroded = ndimage.binary_erosion(mask, square, border_value=1)
        union |= ndimage.binary_dilation(eroded, square, border_value=0)
    if not union.any():
        return 0, 0, len(union)
    (top, bottom), (left, right) = ((s.start, s.stop) for s in ndimage.find_objects(union.astype(int))[0])
    side = max(bottom - top, right - left)
    corner = [
        int(np.clip((a + b - side) // 2, 0, len(union) - side)) for a, b in ((top, bottom), (left, right))
    ]
    return corner[0], corner[1], side


def ellipse(size: int, row: float, column: float, height: float, width: float) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return ((rows - row) / height) ** 2 + ((columns - column) / width) ** 2 <= 1


def chest(size: int = 197, slices: int = 3, row: float = 0.5, column: float = 0.5) -> np.ndarray:
    """A body with lungs, a table and a blanket too thin to survive the opening, and noise."""
    rng = np.random.default_rng(size)
    hu = np.full((slices, size, size), AIR, np.int16)
    for z in range(slices):
        reach = 0.3 + 0.02 * z
        hu[z][ellipse(size, row * size, column * size, 0.7 * reach * size, reach * size)] = TISSUE
        for side in (-1, 1):
            hu[z][ellipse(size, row * size, (column + 0.12 * side) * size, 0.13 * size, 0.09 * size)] = -850
        hu[z, int(0.93 * size) : int(0.93 * size) + 7, :] = 300
        hu[z, 3:5, 20:180] = -100
    return hu + rng.integers(-30, 31, hu.shape).astype(np.int16)


def check_box(hu: np.ndarray, opening_px: int = 25) -> tuple[int, int, int]:
    box = body_box(torch.from_numpy(hu))
    assert box == box_by_opening(hu, -500, opening_px)
    return box


@pytest.mark.parametrize(("row", "column"), [(0.5, 0.5), (0.3, 0.62), (0.1, 0.05), (0.97, 0.9)])
def test_box_of_a_chest_equals_the_opened_one_wherever_the_body_lies(row, column):
    check_box(chest(row=row, column=column))


def test_table_and_blanket_do_not_count_as_body():
    top, left, side = check_box(chest())
    assert top > 5  # below the blanket
    assert top + side < int(0.93 * 197)  # above the table
    assert left > 0


@pytest.mark.parametrize("opening_px", [1, 3, 5, 11, 25])
@pytest.mark.parametrize("density", [0.6, 0.9, 0.985, 0.998])
def test_box_of_random_masks_equals_the_opened_one(opening_px, density, monkeypatch):
    monkeypatch.setattr(slice_strategies_module, "OPENING_PX", opening_px)
    rng = np.random.default_rng([opening_px, int(1000 * density)])
    hu = np.where(rng.random((2, 53, 53)) < density, TISSUE, AIR).astype(np.int16)
    check_box(hu, opening_px)


def test_body_that_touches_every_border_is_the_whole_image():
    hu = chest()
    hu[1] = TISSUE
    assert check_box(hu) == (0, 0, 197)


def test_border_does_not_erode():
    hu = np.full((1, 61, 61), AIR, np.int16)
    hu[0, 40:, :30] = TISSUE  # 21 rows, fewer than the opening, but cut off by the border
    assert check_box(hu) == (31, 0, 30)


def test_empty_volume_keeps_the_whole_image():
    hu = np.full((2, 41, 41), AIR, np.int16)
    hu[:, 10:30, 10:30] = TISSUE  # smaller than the opening
    assert check_box(hu) == (0, 0, 41)


def test_box_unites_all_slices_across_chunks():
    hu = np.full((4 * BITS + 5, 64, 64), AIR, np.int16)
    hu[0, 2:30, 4:34] = TISSUE
    hu[-1, 20:50, 11:41] = TISSUE
    assert check_box(hu) == (2, 0, 48)


def test_the_type_does_not_matter():
    hu = torch.from_numpy(chest())
    assert body_box(hu.float()) == body_box(hu)


def test_threshold_is_exclusive():
    hu = torch.full((1, 40, 40), -500)
    hu[0, 5:35, 5:35] = -499
    assert body_box(hu) == (5, 5, 30)


@pytest.mark.parametrize("shape", [(2, 7, 8), (2, 1, 8, 8), (8, 8), (0, 8, 8)])
def test_box_of_other_shapes_is_refused(shape):
    with pytest.raises(ValueError, match=r"hu must have shape \(S, H, H\), got \("):
        body_box(torch.zeros(shape))


@pytest.mark.parametrize(("height", "width"), [(3, 6), (6, 3), (5, 5), (4, 7)])
def test_slices_are_padded_to_squares_about_the_middle(height: int, width: int) -> None:
    image = np.arange(2 * height * width, dtype=np.int16).reshape(2, height, width)
    square = pad_to_square(image[:, :, ::-1], -1024)
    side = max(height, width)
    assert square.shape == (2, side, side)
    assert square.flags.c_contiguous
    top, left = (side - height) // 2, (side - width) // 2
    np.testing.assert_array_equal(square[:, top : top + height, left : left + width], image[:, :, ::-1])
    assert (square == -1024).sum() == 2 * (side**2 - height * width)
