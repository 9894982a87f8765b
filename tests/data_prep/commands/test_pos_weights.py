import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from common.shards.writer import VolumeSlices, write_shard
from data_prep import __main__ as module


def invoke(dask: Any, *arguments: object) -> Result:
    scheduler = ("--scheduler", dask.scheduler.address)
    return CliRunner().invoke(
        module.app, ["pos-weights", *map(str, (*arguments, *scheduler))], env={"COLUMNS": "200"}
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    ct = np.full((2, 8, 9), -1000, np.int16)
    ts = np.zeros((2, 128, 128), np.uint8)
    ts[:, :32] = 5  # a quarter of the cells is liver
    for name, mask in (("a", ts), ("b", None)):
        item = VolumeSlices(name, ct, mask, None, (1, 1, 1), (9, 8, 2), "LPS", None, "train")
        write_shard(tmp_path / f"train-00000{'ab'.index(name)}.tar", [item])
    return tmp_path


def test_weights_are_shown_beside_those_in_use_and_written(shards: Path, dask: Any) -> None:
    answer = invoke(dask, shards, "--out", shards / "weights")
    assert answer.exit_code == 0, answer.output
    assert "totalsegmentator: 1 volumes, 1 without" in answer.stdout
    assert re.search(r"liver +│ +25.0000% +│ +4.00 +│ +4.00 +│ +30.53", answer.stdout), answer.stdout
    assert re.search(r"background +│ +75.0000% +│ +1.33 +│ +1.00 +│ +1.00", answer.stdout), answer.stdout
    assert "Never seen: spleen, kidney_right, " in answer.stderr
    assert "No volume of split 'train' has masks of rexgroundingct" in answer.stderr
    with (shards / "weights" / "totalsegmentator.csv").open(newline="") as file:
        liver = list(csv.DictReader(file))[5]
    assert liver == {
        **{"index": "5", "name": "liver", "code": "", "pos_weight": "4", "frequency": "0.25"},
        **{"cells": "8192", "weight_by_frequency": "4.0", "weight_in_use": "30.53"},
    }
    assert [path.name for path in (shards / "weights").iterdir()] == ["totalsegmentator.csv"]


def test_a_damaged_shard_ends_with_status_1_and_its_name(shards: Path, dask: Any) -> None:
    content = (shards / "train-000000.tar").read_bytes()
    png = content.index(b"\x89PNG")
    (shards / "train-000000.tar").write_bytes(content[:png] + bytes(30) + content[png + 30 :])
    answer = invoke(dask, shards, "--out", shards / "weights")
    assert answer.exit_code == 1
    assert re.search(r"Left out: '.*train-000000.tar': ", answer.stderr)
