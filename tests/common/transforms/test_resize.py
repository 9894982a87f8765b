"""Both resizes are torch's antialiased one, and keep what an area-true filter must keep."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.transforms.resize import resize_square, resize_squares, triangle_filters


@pytest.mark.parametrize(
    ("side", "size"), [(512, 256), (307, 256), (154, 144), (61, 144), (131, 140), (97, 97), (1, 5)]
)
def test_resize_equals_torch_antialiased_bilinear(side, size):
    crop = np.random.default_rng(side).integers(-1024, 3072, (side, side)).astype(np.int16)
    reference = F.interpolate(
        torch.from_numpy(crop)[None, None].double(), (size, size), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(resize_square(crop, size), reference[0, 0].numpy(), atol=3e-3)


@pytest.mark.parametrize(("sides", "size"), [([97, 31, 64, 1, 130], 48), ([16, 5], 24)])
def test_crops_of_any_sides_are_resized_at_once_as_one_by_one(sides, size):
    rng = np.random.default_rng(0)
    crops = [rng.integers(-1024, 3072, (side, side)).astype(np.int16) for side in sides]
    pixels = torch.from_numpy(np.concatenate([crop.ravel() for crop in crops]))
    for largest in (max(sides), max(sides) + 7):
        resized = resize_squares(pixels, torch.tensor(sides), largest, size)
        for one, crop in zip(resized, crops, strict=True):
            reference = F.interpolate(
                torch.from_numpy(crop)[None, None].double(), (size, size), mode="bilinear", antialias=True
            )
            np.testing.assert_allclose(one, reference[0, 0], atol=3e-3)
            np.testing.assert_allclose(one, resize_square(crop, size), atol=2e-3)


def test_weights_are_the_rounded_ratios_of_whole_numbers():
    """A filter that is computed in floating point misses some by more than the last bit."""
    filters = triangle_filters(torch.tensor([307, 1000]), 1024, 144)
    for weights, side in zip(filters, (307, 1000), strict=True):
        exact = np.array(
            [
                [max(2 * side - abs((2 * j + 1) * 144 - (2 * i + 1) * side), 0) for j in range(side)]
                for i in range(144)
            ],
            float,
        )
        expected = (exact / exact.sum(1, keepdims=True)).astype(np.float32)
        np.testing.assert_array_max_ulp(weights[:, :side].numpy(), expected, maxulp=1)
        assert not weights[:, side:].any()


def test_same_size_is_the_identity():
    crop = np.random.default_rng(0).integers(-1024, 3072, (13, 13)).astype(np.int16)
    np.testing.assert_array_equal(resize_square(crop, 13), crop)


def test_integer_reduction_keeps_the_mean_of_the_inside():
    filters = triangle_filters(torch.tensor([60]), 60, 20)[0].numpy()
    np.testing.assert_allclose(filters.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(filters[:, 6:-6].sum(0), 1 / 3, rtol=1e-6)  # every input counts the same


def test_rows_and_columns_are_not_swapped():
    crop = np.zeros((4, 4), np.int16)
    crop[0] = 100
    np.testing.assert_array_equal(resize_square(crop, 4)[0], [100, 100, 100, 100])
    resized = resize_square(crop, 2)
    assert (resized[0] > 40).all()
    assert (resized[1] == 0).all()


def test_only_square_images_are_resized():
    with pytest.raises(ValueError, match=r"crop must be a square image, got shape \(3, 4\)"):
        resize_square(np.zeros((3, 4)), 2)
