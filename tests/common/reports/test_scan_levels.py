"""Levels are found where the same body shows them, by likeness and by a ridge."""

import numpy as np
import pytest
import torch

from common.reports.ct_tokens import CTImages
from common.reports.scan_levels import (
    compare_scans,
    draw_levels,
    fit_positions,
    match_levels,
    read_positions,
)


def test_the_same_path_sampled_elsewhere_is_matched_level_by_level() -> None:
    def path(z: np.ndarray) -> np.ndarray:
        return np.stack([np.cos(z), np.sin(z), z / 3, 0 * z + 40], axis=1)

    query, other = np.linspace(0, 3, 31), np.linspace(0.5, 2.5, 61)
    match = match_levels(path(query), path(other))
    inside = (query > 0.6) & (query < 2.4)
    np.testing.assert_allclose(other[match.best[inside]], query[inside], atol=0.12)
    one, two = path(query), path(other)
    mean = np.concatenate([one, two]).mean(0)
    a, b = one[3] - mean, two[50] - mean
    assert match.similarity[3, 50] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    a, b = one.mean(0), two.mean(0)
    assert match.of_volumes == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_scans_of_two_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths \(3,\) and \(4,\)"):
        match_levels(np.eye(3), np.eye(4))


def body(z_mm: np.ndarray, seed: int) -> np.ndarray:
    """Slices of one body: a bent path, another noise in every scan."""
    path = np.stack([z_mm / 50, (z_mm / 100) ** 2, np.sin(z_mm / 80)], axis=1) @ np.ones((3, 8))
    path[:, :3] += np.stack([z_mm / 100, -z_mm / 90, 0 * z_mm], axis=1)
    return path + 0.01 * np.random.default_rng(seed).standard_normal(path.shape)


def test_positions_of_the_same_body_are_read_up_to_an_offset() -> None:
    fitted, other = np.arange(0, 300, 3.0), np.arange(90, 210, 5.0)
    reading = read_positions(fit_positions(body(fitted, 0), fitted), body(other, 1), other - 90)
    assert reading.error_mm < 3
    assert reading.correlation > 0.99
    assert reading.offset_mm == pytest.approx(90, abs=4)
    np.testing.assert_allclose(reading.predicted_mm, other, atol=8)


def test_a_tangle_is_not_read() -> None:
    rng = np.random.default_rng(0)
    z_mm = np.arange(0, 300, 3.0)
    fit = fit_positions(rng.standard_normal((100, 8)), z_mm)
    reading = read_positions(fit, rng.standard_normal((100, 8)), z_mm)
    assert abs(reading.correlation) < 0.3
    assert reading.error_mm > 50


def test_a_scan_of_few_slices_is_refused_and_equal_slices_have_no_correlation() -> None:
    with pytest.raises(ValueError, match="fitted scan .* 5 slices, got 4"):
        fit_positions(np.eye(4), np.arange(4))
    fit = fit_positions(body(np.arange(0, 60, 3.0), 0), np.arange(0, 60, 3.0))
    assert np.isnan(read_positions(fit, np.ones((5, 8)), np.arange(5)).correlation)


def images(name: str, z_mm: np.ndarray) -> CTImages:
    numbers = np.arange(len(z_mm))
    hu = torch.from_numpy(numbers * 10.0)[:, None, None, None].expand(-1, 1, 4, 4)
    return CTImages(name, hu, z_mm - z_mm[0], numbers, (0, 0, 4))


def test_below_each_slice_lies_its_match_in_the_most_alike_scan_first() -> None:
    places = {
        "query": np.arange(0, 300, 3.0),
        "far": np.arange(200, 290, 5.0),
        "near": np.arange(60, 240, 4.0),
    }
    shown = [images(name, z_mm) for name, z_mm in places.items()]
    scans = compare_scans(shown, [body(z_mm, seed) for seed, z_mm in enumerate(places.values())])
    assert [scan.images.name for scan in scans] == ["query", "near", "far"]
    panels = np.reshape(draw_levels(scans, [40, 60], "title").axes, (3, 5))
    for column, place in enumerate((40, 60)):
        assert panels[0, column].images[0].get_array()[0, 0] == place * 10
        found = scans[1].match.best[place]
        assert panels[1, column].images[0].get_array()[0, 0] == found * 10
        assert panels[1, column].get_title().startswith(f"slice {found}, {4 * found} mm, cos ")
    np.testing.assert_array_equal(panels[1, 2].images[0].get_array(), scans[1].match.similarity)
    dots = panels[1, 2].lines[0].get_xydata()
    np.testing.assert_array_equal(dots[:, 0], 4 * scans[1].match.best)
    read = panels[1, 3].collections[0].get_offsets()
    np.testing.assert_allclose(read[:, 1], scans[1].reading.predicted_mm)
