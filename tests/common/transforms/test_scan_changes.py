"""Changes of a scan do what they say: hand numbers, SciPy in float64, and scans that were drawn changed."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from common.transforms.scan_changes import CHANGES, UNSHARP_MM, Scan, chosen_changes, noise_hu
from data_prep.phantom.anatomy import TS_IDS
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render
from data_prep.phantom.scanner import KERNELS, Redraw
from tests.common.engines.conftest import trunk


def scan_of(hu: np.ndarray, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 2.0), **others) -> Scan:
    return Scan(torch.from_numpy(hu.astype(np.int16)), spacing_mm, torch.arange(len(hu)), **others)


def changed(name: str, scan: Scan, strength: float = 1.0, seed: int = 0) -> Scan | None:
    return CHANGES[name].apply(scan, strength, torch.Generator().manual_seed(seed))


def noise(shape: tuple[int, ...], sigma: float, mean: float = 40.0) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, sigma, shape).round()


def impulse(side: int = 65) -> np.ndarray:
    hu = np.zeros((2, side, side))
    hu[:, side // 2, side // 2] = 3000
    return hu


def test_slices_are_kept_or_averaged_and_know_where_they_lay() -> None:
    hu = noise((11, 6, 6), 300)
    kept = changed("every_nth_slice", scan_of(hu), 4)
    assert kept.origin.tolist() == [0, 4, 8]
    assert kept.spacing_mm == (1, 1, 8)
    np.testing.assert_array_equal(kept.hu, hu[::4])
    thick = changed("thicker_slices", scan_of(hu), 4)
    assert thick.origin.tolist() == [1, 5]
    np.testing.assert_array_equal(thick.hu, [hu[:4].mean(0).round(), hu[4:8].mean(0).round()])
    assert changed("thicker_slices", scan_of(hu), 8) is None  # one slice is no volume
    assert changed("every_nth_slice", scan_of(hu[:8]), 8) is None


@pytest.mark.parametrize(("share", "expected"), [(0.5, 17.0), (0.25, 24.0), (0.1, 37.9)])
def test_noise_grows_with_the_root_of_the_dose_that_is_left_out(share, expected) -> None:
    hu = noise((6, 128, 128), 12)
    assert noise_hu(torch.from_numpy(hu)) == pytest.approx(12, abs=1)
    lower = changed("lower_dose", scan_of(hu), share)
    assert float(lower.hu.double().std()) == pytest.approx(expected, rel=0.06)
    assert torch.equal(lower.hu, changed("lower_dose", scan_of(hu), share).hu)
    assert not torch.equal(lower.hu, changed("lower_dose", scan_of(hu), share, seed=1).hu)
    assert changed("lower_dose", scan_of(np.full((2, 32, 32), -1000)), share) is None


def test_added_noise_is_strongest_where_a_kernel_makes_it_so() -> None:
    hu = noise((32, 128, 128), 30)
    spacing_mm = 0.5
    added = changed("lower_dose", scan_of(hu, (spacing_mm, spacing_mm, 1)), 0.1).hu.double().numpy() - hu
    power = (np.abs(np.fft.fft2(added)) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(128, spacing_mm)] * 2))
    rings = np.arange(0.02, 0.98, 0.04)
    found = np.array([power[np.abs(frequency - ring) < 0.02].mean() for ring in rings])
    expected = rings * np.exp(-(rings**2) / (2 * 0.3**2))
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), atol=0.012)


@pytest.mark.parametrize("sigma_mm", [0.5, 1.0])
def test_a_smoother_kernel_spreads_a_point_by_its_mm_in_both_directions(sigma_mm) -> None:
    spread = changed("smoother_kernel", scan_of(impulse(), (0.4, 0.6, 1)), sigma_mm).hu[0].double().numpy()
    weight = spread / spread.sum()
    for axis, pixel_mm in ((0, 0.6), (1, 0.4)):
        at = (np.arange(65) - 32) * pixel_mm
        variance = (weight.sum(1 - axis) * at**2).sum()
        assert math.sqrt(variance) == pytest.approx(sigma_mm, rel=0.05)


def test_a_sharper_kernel_is_an_unsharp_mask() -> None:
    hu = ndimage.gaussian_filter(noise((2, 64, 64), 400), (0, 2, 2))
    sharp = changed("sharper_kernel", scan_of(hu, (0.5, 0.5, 1)), 2).hu
    whole = hu.astype(np.int16).astype(np.float64)
    blurred = ndimage.gaussian_filter(whole, (0, UNSHARP_MM / 0.5, UNSHARP_MM / 0.5), mode="wrap", truncate=8)
    np.testing.assert_allclose(sharp, whole + 2 * (whole - blurred), atol=1)


def test_calibration_shifts_and_stretches_hu_within_what_is_stored() -> None:
    hu = np.array([[[-1020, 40], [1000, 3000]]])
    for name, strength, expected in (
        ("hu_offset", -7, [-1024, 33, 993, 2993]),
        ("hu_gain", 1.1, [-1020, 44, 1100, 3071]),
        ("rescaled_again", -1024, [-1024, -984, -24, 1976]),
        ("rescaled_again", 1024, [4, 1064, 2024, 3071]),
    ):
        found = changed(name, scan_of(hu), strength).hu
        assert found.dtype == torch.int16
        assert found.flatten().tolist() == expected


def test_the_field_of_view_is_cut_to_the_lungs_with_a_margin() -> None:
    hu = trunk(0, 23)
    scan = scan_of(hu, (6, 6, 8))
    # lungs: rows 24 to 51, columns 14 to 53
    np.testing.assert_array_equal(changed("field_of_view", scan, 0).hu, hu[:, 18:58, 14:54])
    np.testing.assert_array_equal(changed("field_of_view", scan, 12).hu, hu[:, 16:60, 12:56])
    assert changed("field_of_view", scan, 200) is None
    assert changed("field_of_view", scan_of(np.full((9, 32, 32), 40), (6, 6, 8)), 0) is None


@pytest.mark.parametrize("finer", [1, 2])
def test_table_and_arms_become_air_and_the_body_stays(finer) -> None:
    body = trunk(0, 12)
    hu = body.copy()
    hu[:, 62:64, 5:60] = -60  # table
    hu[:, 30:40, 1:5] = 60  # an arm, two pixels beside
    hu[:, :, 5:8] = -1000
    hu, body = (array.repeat(finer, 1).repeat(finer, 2) for array in (hu, body))
    found = changed("body_alone", scan_of(hu, (6 / finer, 6 / finer, 4)))
    np.testing.assert_array_equal(found.hu, body)
    assert changed("body_alone", scan_of(np.full((3, 32, 32), -1000))) is None


def test_pixels_get_coarser_and_keep_their_place() -> None:
    ramp = np.broadcast_to(10 * np.arange(40), (3, 40, 40))
    found = changed("coarser_pixels", scan_of(ramp, (1.0, 1.0, 2.0)), 2)
    assert found.hu.shape == (3, 20, 20)
    assert found.spacing_mm == (2, 2, 2)
    np.testing.assert_array_equal(found.hu[0, 0, 2:-2], 10 * (np.arange(2, 18) * 2 + 0.5))
    assert changed("coarser_pixels", scan_of(ramp), 1) is None


def test_turned_scans_are_mirrored_along_the_axis_they_name() -> None:
    hu = noise((5, 7, 7), 300)
    scan = scan_of(hu, (1.0, 3.0, 2.0))
    np.testing.assert_array_equal(changed("flipped_left_right", scan).hu, hu[:, :, ::-1])
    np.testing.assert_array_equal(changed("flipped_front_back", scan).hu, hu[:, ::-1])
    head_first = changed("flipped_head_feet", scan)
    np.testing.assert_array_equal(head_first.hu, hu[::-1])
    assert head_first.origin.tolist() == [4, 3, 2, 1, 0]
    turned = changed("transposed", scan)
    np.testing.assert_array_equal(turned.hu, hu.transpose(0, 2, 1))
    assert turned.spacing_mm == (3, 1, 2)


def test_contrast_is_added_to_blood_alone() -> None:
    hu, blood = noise((3, 8, 8), 10), torch.zeros(3, 8, 8, dtype=torch.bool)
    blood[1, 2:4] = True
    found = changed("more_contrast", scan_of(hu, blood=blood), 150)
    np.testing.assert_array_equal(found.hu, hu + 150 * blood.numpy())
    assert changed("more_contrast", scan_of(hu), 150) is None


def test_rods_and_streaks_lie_within_the_lungs_height_and_grow_with_the_strength() -> None:
    hu = trunk(0, 23)
    weak, strong = (changed("metal_streaks", scan_of(hu, (6, 6, 8)), strength).hu for strength in (25, 50))
    slices = np.flatnonzero((strong != torch.from_numpy(hu)).any(2).any(1))
    lungs = np.flatnonzero((hu[:, :, 14:54] == -850).any((1, 2)))
    assert lungs[0] < slices[0] < slices[-1] < lungs[-1]
    assert (np.diff(slices) == 1).all()
    is_rod = strong[slices[0]] == 3071
    assert 1 <= int(is_rod.sum()) <= 4  # 6 mm wide, as a pixel
    once, twice = (of[slices[0]][~is_rod].numpy() - hu[slices[0]][~is_rod.numpy()] for of in (weak, strong))
    held = np.abs(twice + hu[slices[0]][~is_rod.numpy()]) < 1000  # the rest is clipped
    np.testing.assert_allclose(twice[held], 2.0 * once[held], atol=2)
    assert changed("metal_streaks", scan_of(np.full((9, 32, 32), 40), (6, 6, 8)), 50) is None


def test_an_unknown_change_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"got 'thick_slices'. Did you mean 'thicker_slices'\?"):
        chosen_changes(["thick_slices"])
    for wrong in ([], "transposed", ["transposed", "transposed"]):
        with pytest.raises(ValueError, match="each once"):
            chosen_changes(wrong)
    assert len(chosen_changes(None)) == sum(len(change.strengths) for change in CHANGES.values())


STILL = 1e9  # of the dose: no noise


def drawn(**redraw) -> Volume:
    """A phantom as another kernel, dose or table draws it."""
    return render(roster(1, seed=0)[0], "a", 160, (12.0, 12.0), {}, Redraw(**redraw))


def test_a_smoother_kernel_is_the_one_that_the_phantoms_scanner_draws() -> None:
    names = ("PHANTOM_SHARP", "PHANTOM_SOFT")
    sharp, smooth = (drawn(kernel=name, dose=STILL) for name in names)
    # a share given to the two neighbours spreads by that variance, in square pixels
    variances = [KERNELS[name].blur for name in names]
    pixel_mm = sharp.protocol.pixel_mm
    scan = scan_of(sharp.hu, (pixel_mm, pixel_mm, 12.0))
    found = changed("smoother_kernel", scan, pixel_mm * math.sqrt(variances[1] - variances[0])).hu.double()
    differs, is_left = (
        np.sqrt(((of - smooth.hu) ** 2).mean()) for of in (sharp.hu.astype(float), found.numpy())
    )
    assert is_left < 0.3 * differs  # a Gaussian is no share given to neighbours


@pytest.mark.parametrize("kernel", ["PHANTOM_SOFT", "PHANTOM_LUNG"])
def test_a_lower_dose_is_as_noisy_as_the_phantoms_scanner_draws_it(kernel) -> None:
    still, full, quarter = (drawn(kernel=kernel, dose=dose) for dose in (STILL, 1.0, 0.25))
    pixel_mm = full.protocol.pixel_mm
    found = changed("lower_dose", scan_of(full.hu, (pixel_mm, pixel_mm, 12.0)), 0.25).hu.numpy()
    middle = np.isin(still.ts, [TS_IDS["liver"], TS_IDS["heart"]])
    before, simulated, expected = (
        (of.astype(float) - still.hu)[middle].std() for of in (full.hu, found, quarter.hu)
    )
    assert simulated == pytest.approx(expected, rel=0.15)
    assert before < 0.6 * expected


def test_a_table_is_removed_as_where_the_phantom_was_drawn_without() -> None:
    with_table, without = (drawn(dose=STILL, table=table).hu for table in (True, False))
    found = changed("body_alone", scan_of(with_table, (2.0, 2.0, 12.0))).hu.numpy()
    table = with_table != without
    assert table.mean() > 0.05
    assert (np.abs(found - without)[table] < 60).mean() > 0.98
    assert (found[without > -500] == without[without > -500]).mean() > 0.98
