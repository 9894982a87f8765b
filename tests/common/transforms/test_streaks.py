"""Projections against chords of discs, back-projection against Abel's inversion, errors only of metal."""

import math

import numpy as np
import pytest
import torch

from common.transforms.streaks import NUM_ANGLES, back_project, metal_errors, project, streaks_of_rods

SIDE, PIXEL_MM, RADIUS_MM = 192, 2.0, 60.0
AT = (np.arange(SIDE) - SIDE / 2 + 0.5) * PIXEL_MM


def disc(radius_mm: float, x_mm: float = 0.0, y_mm: float = 0.0) -> torch.Tensor:
    far = np.hypot(AT[None] - x_mm, AT[:, None] - y_mm)
    return torch.from_numpy(np.clip(0.5 + (radius_mm - far) / PIXEL_MM, 0, 1)).float()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_rays_through_a_disc_are_its_chords_at_every_angle() -> None:
    (rays,) = project(disc(RADIUS_MM, 30, -50)[None], PIXEL_MM)
    angles = np.pi * np.arange(NUM_ANGLES) / NUM_ANGLES
    passed = AT[None] - (30 * np.cos(angles) - 50 * np.sin(angles))[:, None]
    chords = 2 * np.sqrt(np.clip(RADIUS_MM**2 - passed**2, 0, None))
    inside = np.abs(np.abs(passed) - RADIUS_MM) > 4  # an edge of two pixels is no chord's
    np.testing.assert_allclose(rays.numpy()[inside], chords[inside], atol=1.5)


def test_chords_come_back_as_the_disc_and_their_squares_as_its_cupping() -> None:
    chords = torch.from_numpy(2 * np.sqrt(np.clip(RADIUS_MM**2 - AT**2, 0, None))).float()
    far = np.hypot(AT[None], AT[:, None])
    inside, outside = far < RADIUS_MM - 6, (far > RADIUS_MM + 6) & (far < 180)
    found = back_project(chords.expand(1, NUM_ANGLES, -1), PIXEL_MM)[0].numpy()
    assert np.abs(found[inside] - 1).max() < 0.05
    assert np.abs(found[outside]).max() < 0.05
    # Abel's inversion of 4 (R^2 - s^2): 8 / pi sqrt(R^2 - r^2) within, and no streak beyond a lone disc
    found = back_project(chords.square().expand(1, NUM_ANGLES, -1), PIXEL_MM)[0].numpy()
    cupping = 8 / math.pi * np.sqrt(np.clip(RADIUS_MM**2 - far**2, 0, None))
    np.testing.assert_allclose(found[inside], cupping[inside], atol=0.02 * cupping.max())
    assert np.abs(found[outside]).max() < 0.02 * cupping.max()


def test_errors_lie_on_rays_through_metal_alone() -> None:
    hu, metal = 1000 * disc(120) - 1000, disc(8, 40, 20)
    assert not metal_errors(hu, torch.zeros_like(hu), PIXEL_MM, generator()).any()
    hardening, starvation = metal_errors(hu, metal, PIXEL_MM, generator())
    (through,) = project(metal[None], PIXEL_MM)
    assert not hardening[through == 0].any()
    assert not starvation[through == 0].any()
    # the ray through both middles, along y: 2 sqrt(120^2 - 40^2) mm of water and 16 mm of titanium
    water, titanium = 0.02 * 2 * math.sqrt(120**2 - 40**2), 0.18 * 16
    ray = SIDE // 2 + 19  # at 39 mm, one mm from it
    assert float(hardening[0, ray]) == pytest.approx(-(titanium**2) - 2 * water * titanium, rel=0.05)
    # rays through metal at every angle: the noise has no mean, and its log of variance is the attenuation's
    passed = through > 14
    paths = project(torch.stack([(hu / 1000 + 1) * 0.02, metal * 0.18]), PIXEL_MM)
    sigma = (paths.sum(0).exp() - paths[0].exp()).sqrt()
    assert float((starvation / sigma)[passed].std()) == pytest.approx(1, abs=0.08)
    assert float((starvation / sigma)[passed].mean()) == pytest.approx(0, abs=0.12)


def test_streaks_of_two_rods_have_a_unit_size_and_are_dark_between_them() -> None:
    hu = 1000 * disc(120) - 1000
    streaks, is_rod = streaks_of_rods(hu, (PIXEL_MM, PIXEL_MM), (192.0, 242.0), generator())
    x, y = np.meshgrid(AT, AT - 50)
    far = np.minimum(np.hypot(x - 15, y), np.hypot(x + 15, y))
    np.testing.assert_array_equal(is_rod.numpy(), far < 3)
    near = (far < 50) & (far > 3 + PIXEL_MM / 2)
    assert np.sqrt((streaks.numpy()[near] ** 2).mean()) == pytest.approx(1, abs=0.02)
    between, beside = (np.abs(x) < 8) & (np.abs(y) < 2), (np.abs(x) < 8) & (np.abs(np.abs(y) - 40) < 8)
    assert streaks.numpy()[between].mean() < streaks.numpy()[beside].mean() - 1
