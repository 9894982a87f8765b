import numpy as np
import pytest
import torch

from common.networks.encoder import cls_and_patches
from common.networks.floors import IntensityHistogram, Pixels
from common.transforms.hounsfield import HU_WINDOWS, HUWindow, normalize_hu

WIDE = HUWindow(-1000.0, 1000.0, 0.0, 1.0)


def patches_of(hu: np.ndarray, side: int) -> np.ndarray:
    """``(N, P, side, side)``, row by row."""
    rows, columns = hu.shape[1] // side, hu.shape[2] // side
    return hu.reshape(len(hu), rows, side, columns, side).swapaxes(2, 3).reshape(len(hu), -1, side, side)


@pytest.mark.parametrize("window", [WIDE, HU_WINDOWS["ct_rate"]])
def test_histogram_is_numpys_of_the_slice_and_of_each_patch(window: HUWindow) -> None:
    hu = np.random.default_rng(0).uniform(-1400, 1400, (3, 12, 8)).astype(np.float32)
    encoder = IntensityHistogram(4, window, num_bins=10)
    cls, patches = cls_and_patches(encoder, normalize_hu(torch.from_numpy(hu), window)[:, None])

    def expected(image: np.ndarray) -> np.ndarray:
        clipped = image.clip(window.min_hu, window.max_hu)
        return np.histogram(clipped, 10, (window.min_hu, window.max_hu))[0] / image.size

    np.testing.assert_allclose(cls, [expected(image) for image in hu], atol=1e-6)
    np.testing.assert_allclose(patches, [[expected(p) for p in of] for of in patches_of(hu, 4)], atol=1e-6)
    assert patches.shape == (3, 6, 10)


def test_pixels_are_means_of_blocks_of_the_slice_and_of_each_patch() -> None:
    hu = np.random.default_rng(0).normal(size=(2, 24, 12)).astype(np.float32)
    cls, patches = cls_and_patches(Pixels(6, side_px=3), torch.from_numpy(hu)[:, None])
    np.testing.assert_allclose(cls, hu.reshape(2, 3, 8, 3, 4).mean((2, 4)).reshape(2, 9), atol=1e-6)
    blocks = patches_of(hu, 6).reshape(2, 8, 3, 2, 3, 2).mean((3, 5)).reshape(2, 8, 9)
    np.testing.assert_allclose(patches, blocks, atol=1e-6)
