from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from common.embeddings.store import EmbeddingStore
from common.reports.latent_paths import chosen_paths, main, principal_plane


def test_the_plane_keeps_the_distances_of_a_flat_path() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((7, 2)))[0]
    flat = rng.standard_normal((13, 2)) * [5, 1]
    places, share = principal_plane(flat @ basis.T + 3)
    assert share == pytest.approx(1)
    for one, other in ((0, 5), (3, 12)):
        expected = np.linalg.norm(flat[one] - flat[other])
        assert np.linalg.norm(places[one] - places[other]) == pytest.approx(expected)
    assert np.abs(places.mean(0)).max() < 1e-9
    assert places[:, 0].var() > places[:, 1].var()
    assert (places[0] <= 0).all()


def test_share_is_that_of_the_two_largest_eigenvalues() -> None:
    tokens = np.random.default_rng(1).standard_normal((40, 5)) * [4, 3, 2, 1, 1]
    values = np.sort(np.linalg.eigvalsh(np.cov(tokens.T)))[::-1]
    assert principal_plane(tokens)[1] == pytest.approx(values[:2].sum() / values.sum())


def test_command_draws_encoders_side_by_side(write_paths: Callable[..., Path], tmp_path: Path) -> None:
    folders = [write_paths("line"), write_paths("tangle")]
    paths = chosen_paths([EmbeddingStore(folder) for folder in folders], ["valid_2_a_1"])
    assert list(paths) == ["line", "tangle"]
    tokens, z_mm = paths["line"]["valid_2_a_1"]
    assert len(tokens) == len(z_mm) > 16
    twice = chosen_paths([EmbeddingStore(folder) for folder in (folders[0], *folders)], ["valid_2_a_1"])
    assert list(twice) == [str(folders[0]), "tangle"]  # named alike: here they are even the same folder
    app = typer.Typer()
    app.command()(main)
    for rows, volumes in ((1, ["--volume", "valid_2_a_1"]), (3, [])):
        out = tmp_path / f"{rows}.png"
        answer = CliRunner().invoke(app, [*map(str, folders), "--out", str(out), *volumes])
        assert answer.exit_code == 0, answer.output
        assert Image.open(out).height == pytest.approx(130 * (3.7 * rows + 0.6), abs=2)


def test_command_says_when_no_volume_is_in_all_folders(
    write_paths: Callable[..., Path], tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(main)
    folders = [write_paths("line"), write_paths("tangle", split="train")]
    answer = CliRunner().invoke(app, [*map(str, folders), "--out", str(tmp_path / "a.png")])
    assert str(answer.exception) == "embeddings must be of the same volumes, got none that all folders have."
