from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from common.reports.z_positions import fit_positions, main, read_positions


def scan(z_mm: np.ndarray, seed: int) -> np.ndarray:
    """Slices of one body: a bent path, another noise in every scan."""
    path = np.stack([z_mm / 50, (z_mm / 100) ** 2, np.sin(z_mm / 80)], axis=1) @ np.ones((3, 8))
    path[:, :3] += np.stack([z_mm / 100, -z_mm / 90, 0 * z_mm], axis=1)
    return path + 0.01 * np.random.default_rng(seed).standard_normal(path.shape)


def test_positions_of_the_same_body_are_read_up_to_an_offset() -> None:
    fitted, other = np.arange(0, 300, 3.0), np.arange(90, 210, 5.0)
    fit = fit_positions(scan(fitted, 0), fitted)
    reading = read_positions(fit, scan(other, 1), other - 90)
    assert reading.error_mm < 3
    assert reading.correlation > 0.99
    np.testing.assert_allclose(reading.predicted_mm, other, atol=8)


def test_a_tangle_is_not_read() -> None:
    rng = np.random.default_rng(0)
    z_mm = np.arange(0, 300, 3.0)
    fit = fit_positions(rng.standard_normal((100, 8)), z_mm)
    reading = read_positions(fit, rng.standard_normal((100, 8)), z_mm)
    assert abs(reading.correlation) < 0.3
    assert reading.error_mm > 50


def test_a_scan_of_few_slices_is_refused_and_equal_slices_have_no_correlation() -> None:
    with pytest.raises(ValueError, match="the fitted scan must have at least 5 slices, got 4"):
        fit_positions(np.eye(4), np.arange(4))
    fit = fit_positions(scan(np.arange(0, 60, 3.0), 0), np.arange(0, 60, 3.0))
    assert np.isnan(read_positions(fit, np.ones((5, 8)), np.arange(5)).correlation)


def test_command_draws_a_picture_and_says_how_far_off(
    ct_path: Path, options: list[str], tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(main)
    answer = CliRunner().invoke(app, [str(ct_path), str(ct_path), "--out", str(tmp_path / "a.png"), *options])
    assert answer.exit_code == 0, answer.output
    assert answer.output.count("scan_1: r ") == 2
    assert Image.open(tmp_path / "a.png").height > 800
