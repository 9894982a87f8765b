import csv
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.handlers import dense_differences
from common.handlers.dense_differences import MEASURES
from common.metrics.bootstrap import two_sided_p

CLASSES = "patch totalsegmentator classes"


def write(
    folder: Path, encoder: str, volumes: list[str], seed: int, size: int = 201, classes: str = "heart"
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = {measure: rng.random(size) for measure in MEASURES}
    folder.mkdir()
    further = {"encoder": encoder, "volumes": volumes, CLASSES: [classes, "liver"]}
    np.savez(folder / "resamples.npz", **further, **values)
    return values


def test_differences_are_taken_resample_by_resample(tmp_path):
    first = write(tmp_path / "a", "a", ["v1", "v2"], 0)
    second = write(tmp_path / "b", "b", ["v1", "v2"], 1)
    rows = dense_differences.dense_differences(tmp_path / "a", [tmp_path / "b"])
    assert [row["measure"] for row in rows] == list(MEASURES)
    assert {(row["encoder"], row["reference"]) for row in rows} == {("b", "a")}
    for row in rows:
        difference = second[row["measure"]] - first[row["measure"]]
        assert row["difference"] == difference[0]
        assert (row["low"], row["high"]) == pytest.approx(np.quantile(difference[1:], [0.025, 0.975]))
        assert row["p"] == two_sided_p(difference[1:])


def test_the_command_leaves_out_the_reference_and_writes_a_csv(tmp_path):
    for seed, name in enumerate("abc"):
        write(tmp_path / name, name, ["v1"], seed)
    folders = [str(tmp_path / name) for name in "aabc"]
    runner, app = CliRunner(), dense_differences.typer.Typer()
    app.command()(dense_differences.main)
    result = runner.invoke(app, [*folders, "--out", str(tmp_path / "new" / "d.csv")])
    assert result.exit_code == 0, result.output
    assert "patch rexgroundingct auprc" in result.output
    with (tmp_path / "new" / "d.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["encoder"] for row in rows] == ["b"] * 8 + ["c"] * 8


def test_other_volumes_and_missing_evaluations_are_refused(tmp_path):
    write(tmp_path / "a", "a", ["v1"], 0)
    write(tmp_path / "b", "b", ["v2"], 0)
    with pytest.raises(ValueError, match=r"must be tested on the volumes of .*a'"):
        dense_differences.dense_differences(tmp_path / "a", [tmp_path / "b"])
    write(tmp_path / "c", "c", ["v1"], 0, classes="lung")
    with pytest.raises(ValueError, match="must have the patch totalsegmentator classes of '.*a', got others"):
        dense_differences.dense_differences(tmp_path / "a", [tmp_path / "c"])
    write(tmp_path / "d", "d", ["v1"], 0, size=101)
    with pytest.raises(ValueError, match="must have as many resamples as '.*a', got others"):
        dense_differences.dense_differences(tmp_path / "a", [tmp_path / "d"])
    with pytest.raises(FileNotFoundError, match=r"resamples\.npz, got none in"):
        dense_differences.dense_differences(tmp_path / "a", [tmp_path / "none"])
