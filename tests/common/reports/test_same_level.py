from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from common.reports.same_level import main, match_levels


def test_the_same_path_sampled_elsewhere_is_matched_level_by_level() -> None:
    def path(z: np.ndarray) -> np.ndarray:
        return np.stack([np.cos(z), np.sin(z), z / 3, 0 * z + 40], axis=1)

    query, other = np.linspace(0, 3, 31), np.linspace(0.5, 2.5, 61)
    match = match_levels(path(query), path(other))
    inside = (query > 0.6) & (query < 2.4)
    np.testing.assert_allclose(other[match.best[inside]], query[inside], atol=0.12)
    assert match.similarity.shape == (31, 61)
    assert match.of_volumes > 0.99


def test_scans_of_two_encoders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scans must be of one encoder, got widths \(3,\) and \(4,\)"):
        match_levels(np.eye(3), np.eye(4))


def test_command_draws_a_picture(ct_path: Path, options: list[str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    scans = [str(ct_path), str(ct_path), str(ct_path)]
    answer = CliRunner().invoke(app, [*scans, "--out", str(tmp_path / "a.png"), *options])
    assert answer.exit_code == 0, answer.output
    assert Image.open(tmp_path / "a.png").width > 1000
