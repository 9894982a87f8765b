import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.shards.writer import write_shard
from tests.noise_volume import noise_volume


@pytest.fixture
def hu_shards(tmp_path: Path) -> Path:
    for number, hu in ((0, 40), (1, 60)):
        ct = np.full((3, 30, 30), -1000, np.int16)
        ct[:, 5:25, 5:25] = hu
        volume = noise_volume(f"train_{number}_a_1", ts=False, ct=ct)
        write_shard(tmp_path / f"train-{number:06d}.tar", [volume])
    return tmp_path


def test_statistics_are_shown_beside_the_windows_in_use_and_written(hu_shards, invoke) -> None:
    out, picture = hu_shards / "hu.json", hu_shards / "hu.png"
    answer = invoke("hu-stats", hu_shards, "--out", out, "--picture", picture)
    assert answer.exit_code == 0, answer.output
    assert "2 volumes, 6 slices" in answer.stdout
    for name, values in (
        ("mean", ("50.00", "-142.39", "-25.03")),
        ("standard deviation", ("10.00", "360.97", "246.87")),
        ("0.5 % percentile", ("40.00", "-997.00", "-940.80")),
        ("99.5 % percentile", ("60.00", "888.00", "923.10")),
    ):
        assert re.search(f"{name} +│ +" + " │ +".join(map(re.escape, values)), answer.stdout), answer.stdout
    written = json.loads(out.read_text())
    assert written["mean_hu"] == 50
    assert written["volumes"] == ["train_0_a_1", "train_1_a_1"]
    assert (written["seed"], written["slice_stride"], written["num_slices"]) == (42, 1, 6)
    assert written["histogram"][40 - written["histogram_first_hu"]] == 3 * 388
    with Image.open(picture) as image:
        assert np.asarray(image.convert("L")).std() > 10


def test_a_damaged_volume_ends_with_status_1_and_its_name(hu_shards, invoke) -> None:
    shard = hu_shards / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512:600] = bytes(88)
    shard.write_bytes(content)
    answer = invoke("hu-stats", hu_shards)
    assert answer.exit_code == 1
    assert "1 volumes, 3 slices" in answer.stdout
    assert "Left out: 'train_0_a_1': " in answer.stderr


@pytest.fixture
def mask_shards(tmp_path: Path) -> Path:
    ts = np.zeros((2, 128, 128), np.uint8)
    ts[:, :32] = 5  # a quarter of the cells is liver
    for name, mask in (("a", ts), ("b", None)):
        item = noise_volume(name, 2)._replace(ts=mask)
        write_shard(tmp_path / f"train-00000{'ab'.index(name)}.tar", [item])
    return tmp_path


def test_weights_are_shown_beside_those_in_use_and_written(mask_shards, invoke) -> None:
    answer = invoke("pos-weights", mask_shards, "--out", mask_shards / "weights")
    assert answer.exit_code == 0, answer.output
    assert "totalsegmentator: 1 volumes, 1 without" in answer.stdout
    assert re.search(r"liver +│ +25.0000% +│ +4.00 +│ +4.00 +│ +30.53", answer.stdout), answer.stdout
    assert re.search(r"background +│ +75.0000% +│ +1.33 +│ +1.00 +│ +1.00", answer.stdout), answer.stdout
    assert "Never seen: spleen, kidney_right, " in answer.stderr
    assert "No volume of split 'train' has masks of rexgroundingct" in answer.stderr
    with (mask_shards / "weights" / "totalsegmentator.csv").open(newline="") as file:
        liver = list(csv.DictReader(file))[5]
    assert liver == {
        **{"index": "5", "name": "liver", "code": "", "pos_weight": "4", "frequency": "0.25"},
        **{"cells": "8192", "weight_by_frequency": "4.0", "weight_in_use": "30.53"},
    }
    assert [path.name for path in (mask_shards / "weights").iterdir()] == ["totalsegmentator.csv"]


def test_a_damaged_shard_ends_with_status_1_and_its_name(mask_shards, invoke) -> None:
    content = (mask_shards / "train-000000.tar").read_bytes()
    png = content.index(b"\x89PNG")
    (mask_shards / "train-000000.tar").write_bytes(content[:png] + bytes(30) + content[png + 30 :])
    answer = invoke("pos-weights", mask_shards, "--out", mask_shards / "weights")
    assert answer.exit_code == 1
    assert re.search(r"Left out: '.*train-000000.tar': ", answer.stderr)
