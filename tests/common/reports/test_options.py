import importlib

import pytest
import typer
from typer.testing import CliRunner

MODULES = ("latent_paths", "pca_patches", "probe_maps", "same_level", "similar_patches", "z_positions")


@pytest.mark.parametrize("name", MODULES)
def test_every_picture_command_has_help_with_an_example(name: str) -> None:
    app = typer.Typer()
    app.command()(importlib.import_module(f"common.reports.{name}").main)
    answer = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"})
    assert answer.exit_code == 0
    assert f"Example: python -m common.reports.{name} " in answer.output
    assert "PNG to write" in answer.output
