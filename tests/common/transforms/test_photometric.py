"""Photometric augmentation of a batch equals a loop over its views."""

import math

import numpy as np
import pytest
import torch

from common.transforms.hounsfield import HU_WINDOWS, normalize_hu
from common.transforms.photometric import photometric

WINDOW = HU_WINDOWS["ct_rate"]


def drawn(batch: int = 2, views: int = 3, size: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hu = torch.randint(-1024, 3072, (batch, views, size, size), generator=generator).to(torch.int16)
    gamma = 0.9 + 0.2 * torch.rand(batch, views, generator=generator)
    sigma = 0.1 + 1.9 * torch.rand(batch, views, generator=generator)
    sigma[0, 1] = 0
    gamma[1, 0] = 1
    return hu, gamma, sigma


def one_view_by_hand(hu: np.ndarray, gamma: float, sigma: float) -> np.ndarray:
    """Float64, pixel by pixel: clip, 0..1, gamma, 3 x 3 Gaussian with reflected border, HU, z-score."""
    low, high, mean, std = WINDOW
    unit = ((np.clip(hu.astype(np.float64), low, high) - low) / (high - low)) ** gamma
    size = len(unit)
    blurred = unit.copy()
    if sigma > 0:
        weights = {
            (i, j): math.exp(-(i * i + j * j) / (2 * sigma**2)) for i in (-1, 0, 1) for j in (-1, 0, 1)
        }
        for row in range(size):
            for column in range(size):
                blurred[row, column] = sum(
                    weight * unit[reflected(row + i, size), reflected(column + j, size)]
                    for (i, j), weight in weights.items()
                ) / sum(weights.values())
    return (blurred * (high - low) + low - mean) / std


def reflected(index: int, size: int) -> int:
    """Reflection about the border pixel: -1 is 1, size is size - 2."""
    return size - 1 - abs(size - 1 - abs(index))


def test_batch_equals_a_float64_loop_over_views():
    hu, gamma, sigma = drawn()
    out = photometric(hu, gamma, sigma, WINDOW)
    assert out.shape == (2, 3, 1, 7, 7)
    assert out.dtype == torch.float32
    for b in range(2):
        for v in range(3):
            expected = one_view_by_hand(hu[b, v].numpy(), gamma[b, v].item(), sigma[b, v].item())
            np.testing.assert_allclose(out[b, v, 0].numpy(), expected, atol=5e-6)


def test_gamma_1_and_sigma_0_are_plain_normalisation():
    hu, gamma, sigma = drawn()
    out = photometric(hu, torch.ones_like(gamma), torch.zeros_like(sigma), WINDOW)
    torch.testing.assert_close(out.squeeze(2), normalize_hu(hu, WINDOW), atol=2e-6, rtol=0)


def test_gamma_works_on_unit_intensities_and_keeps_black_and_white():
    low, high, mean, std = WINDOW
    middle = (low + high) / 2
    hu = torch.tensor([low - 20, middle, high + 20]).repeat(3, 1)[None, None]
    out = photometric(hu, torch.tensor([[2.0]]), torch.zeros(1, 1), WINDOW)[0, 0, 0, 0] * std + mean
    torch.testing.assert_close(out, torch.tensor([low, low + (high - low) / 4, high]), atol=1e-3, rtol=0)


def test_blur_keeps_a_constant_and_the_mean_of_a_far_off_spot():
    hu = torch.full((1, 1, 11, 11), -500, dtype=torch.int16)
    gamma, sigma = torch.ones(1, 1), torch.full((1, 1), 1.3)
    torch.testing.assert_close(
        photometric(hu, gamma, sigma, WINDOW).squeeze(2), normalize_hu(hu, WINDOW), atol=2e-6, rtol=0
    )
    hu[0, 0, 5, 5] = 300
    blurred, sharp = photometric(hu, gamma, sigma, WINDOW).squeeze(2), normalize_hu(hu, WINDOW)
    torch.testing.assert_close(blurred.mean(), sharp.mean())
    assert blurred.std() < sharp.std()


def test_views_do_not_leak_into_each_other():
    hu, gamma, sigma = drawn()
    together = photometric(hu, gamma, sigma, WINDOW)
    alone = photometric(hu[1:, 2:], gamma[1:, 2:], sigma[1:, 2:], WINDOW)
    torch.testing.assert_close(together[1:, 2:], alone)


@pytest.mark.parametrize("name", ["gamma", "blur_sigma"])
def test_numbers_for_other_views_are_refused(name):
    hu, gamma, sigma = drawn()
    numbers = {"gamma": gamma, "blur_sigma": sigma}
    numbers[name] = numbers[name][:, :2]
    with pytest.raises(
        ValueError, match=rf"{name} must have shape \(B, V\) .* got \(2, 2\) for \(2, 3, 7, 7\)"
    ):
        photometric(hu, window=WINDOW, **numbers)
    with pytest.raises(ValueError, match=r"got \(2, 3\) for \(2, 3, 1, 7, 7\)"):
        photometric(hu[:, :, None], gamma, sigma, WINDOW)
