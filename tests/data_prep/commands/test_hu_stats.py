import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from common.shards.writer import VolumeSlices, write_shard
from data_prep import __main__ as module


def invoke(dask: Any, *arguments: object) -> Result:
    scheduler = ("--scheduler", dask.scheduler.address)
    return CliRunner().invoke(
        module.app, ["hu-stats", *map(str, (*arguments, *scheduler))], env={"COLUMNS": "200"}
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number, hu in ((0, 40), (1, 60)):
        ct = np.full((3, 30, 30), -1000, np.int16)
        ct[:, 5:25, 5:25] = hu
        volume = VolumeSlices(
            f"train_{number}_a_1", ct, None, None, (1, 1, 1), (30, 30, 3), "LPS", None, "train"
        )
        write_shard(tmp_path / f"train-{number:06d}.tar", [volume])
    return tmp_path


def test_statistics_are_shown_beside_the_windows_in_use_and_written(shards: Path, dask: Any) -> None:
    out, picture = shards / "hu.json", shards / "hu.png"
    answer = invoke(dask, shards, "--out", out, "--picture", picture)
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


def test_a_sample_is_as_large_as_asked_for(shards: Path, dask: Any) -> None:
    answer = invoke(dask, shards, "--volumes", 1, "--slice-stride", 2)
    assert answer.exit_code == 0, answer.output
    assert "1 volumes, 2 slices" in answer.stdout


def test_a_damaged_volume_ends_with_status_1_and_its_name(shards: Path, dask: Any) -> None:
    shard = shards / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512:600] = bytes(88)
    shard.write_bytes(content)
    answer = invoke(dask, shards)
    assert answer.exit_code == 1
    assert "1 volumes, 3 slices" in answer.stdout
    assert "Left out: 'train_0_a_1': " in answer.stderr
