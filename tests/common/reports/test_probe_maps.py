from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from common.labels import load_labels
from common.networks.dense_probe import save_dense_probe
from common.reports.probe_maps import main, probabilities, probe_of


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    for task in ("rexgroundingct", "totalsegmentator"):
        names = [label.name for label in load_labels(task)]
        card = {"class_names": names, "encoder": "dale_ct_2s"}
        save_dense_probe(tmp_path / "probes", "patch", task, torch.nn.Linear(24, len(names)), card)
    return tmp_path / "probes"


def test_a_class_is_found_in_the_task_that_knows_it(probes: Path) -> None:
    layer, places = probe_of(probes, ["heart", "liver"], "dale_ct_2s")
    assert (len(layer.bias), places) == (118, [51, 5])
    assert len(probe_of(probes, ["Emphysema"], "dale_ct_2s")[0].bias) == 14
    patches = torch.randn(2, 3, 3, 24)
    maps = probabilities(layer, patches, places)
    expected = float(torch.sigmoid(patches[1, 2, 0] @ layer.weight[51] + layer.bias[51]).detach())
    assert maps.shape == (2, 2, 3, 3)
    assert maps[0, 1, 2, 0] == pytest.approx(expected, abs=1e-6)


def test_unknown_classes_and_other_encoders_are_refused(probes: Path) -> None:
    with pytest.raises(
        ValueError, match=r"names must be of one task, among .*, got \['Emphysema', 'liver'\]"
    ):
        probe_of(probes, ["Emphysema", "liver"], "dale_ct_2s")
    with pytest.raises(ValueError, match="probes must be of encoder 'dale_ct_0', got 'dale_ct_2s' in"):
        probe_of(probes, ["liver"], "dale_ct_0")


def test_command_draws_a_picture(ct_path: Path, options: list[str], probes: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    what = ["--probes", str(probes), "--name", "liver", "--name", "heart", "--out", str(tmp_path / "a.png")]
    answer = CliRunner().invoke(app, [str(ct_path), *what, *options])
    assert answer.exit_code == 0, answer.output
    assert Image.open(tmp_path / "a.png").width > 1000
