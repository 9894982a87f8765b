"""The sparse resize is torch's antialiased one, and keeps what an area-true filter must keep."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.transforms.resize import resize_square, triangle_filters


@pytest.mark.parametrize(
    ("side", "size"), [(512, 256), (307, 256), (154, 144), (61, 144), (131, 140), (97, 97), (1, 5)]
)
def test_resize_equals_torch_antialiased_bilinear(side, size):
    crop = np.random.default_rng(side).integers(-1024, 3072, (side, side)).astype(np.int16)
    reference = F.interpolate(
        torch.from_numpy(crop)[None, None].double(), (size, size), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(resize_square(crop, size), reference[0, 0].numpy(), atol=3e-3)


def test_same_size_is_the_identity():
    crop = np.random.default_rng(0).integers(-1024, 3072, (13, 13)).astype(np.int16)
    np.testing.assert_array_equal(resize_square(crop, 13), crop)


def test_integer_reduction_keeps_the_mean_of_the_inside():
    filters = triangle_filters(60, 20).toarray()
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
