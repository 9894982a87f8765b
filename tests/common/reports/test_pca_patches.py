from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from common.reports.pca_patches import main, pca_colours


def test_colours_are_the_three_main_components() -> None:
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(9, 9, generator=rng, dtype=torch.float64))[0]
    places = torch.rand(5, 4, 4, 3, generator=rng, dtype=torch.float64) ** 3 * torch.tensor([9.0, 3.0, 1.0])
    colours = pca_colours(places @ basis[:3] + 7)
    for channel in range(3):
        correlation = np.corrcoef(colours[..., channel].ravel(), places[..., channel].numpy().ravel())[0, 1]
        assert correlation > 0.9
    assert (colours.min(), colours.max()) == (0, 1)


def test_hidden_patches_do_not_change_the_colours_of_others() -> None:
    tokens = torch.randn(2, 3, 3, 6, generator=torch.Generator().manual_seed(1))
    shown = torch.ones(2, 3, 3, dtype=torch.bool)
    shown[0, 0] = False
    before = pca_colours(tokens, shown)
    tokens[0, 0] = 100
    np.testing.assert_allclose(pca_colours(tokens, shown)[shown], before[shown])


def test_command_draws_a_picture(ct_path: Path, options: list[str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    answer = CliRunner().invoke(app, [str(ct_path), "--out", str(tmp_path / "a.png"), *options])
    assert answer.exit_code == 0, answer.output
    assert Image.open(tmp_path / "a.png").width > 1000
