import json
from pathlib import Path

import pytest

from common.shards.writer import write_shard
from data_prep.shards.tables import write_manifest, write_rejected
from tests.noise_volume import noise_volume


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "train-000000.tar", [noise_volume(ts=False)])
    write_manifest(folder, "train", [], {})
    write_rejected(folder, "train", [])
    return folder


def test_sound_shards_end_with_status_0_and_strange_volumes_are_only_listed(shards, tmp_path, invoke) -> None:
    answer = invoke("audit", shards, "--report", tmp_path / "page.html", "--sheets", 1)
    assert answer.exit_code == 0, answer.output
    assert "The scan is as long as a chest" in answer.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<img") == 1
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["passed"] is True


def test_damaged_shards_end_with_status_1(shards, invoke) -> None:
    (shards / "manifest.csv").unlink()
    answer = invoke("audit", shards, "--sample", 0)
    assert answer.exit_code == 1, answer.output
    assert "manifest.csv: cannot be read: FileNotFoundError" in answer.stdout
    assert json.loads((shards / "audit.json").read_text(encoding="utf-8"))["num_decoded"] == 0


def test_a_report_needs_a_folder_before_anything_is_read(shards, tmp_path, invoke) -> None:
    answer = invoke("audit", shards, "--report", tmp_path / "nowhere" / "page.html")
    assert isinstance(answer.exception, FileNotFoundError)
    assert "report must be in a folder that exists" in str(answer.exception)
