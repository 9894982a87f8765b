import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from data_prep.sources.ct_rate import find_ct_rate
from data_prep.sources.rexgroundingct import read_annotations

REPOSITORY = Path(__file__).resolve().parents[3]
CT_RATE, REX = "ibrahimhamamci/CT-RATE", "rajpurkarlab/ReXGroundingCT"


@pytest.fixture
def invoke(run_command: Callable[..., Result]) -> Callable[..., Result]:
    return partial(run_command, "download")


def publish(hub: Any, folder: Path) -> None:
    """Put the files of a folder on the hub."""
    hub.files |= {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def publish_ct_rate(hub: Any, tiny: Any, save_nifti: Callable[..., Path], num_patients: int = 4) -> None:
    for number in range(1, num_patients + 1):
        volume = f"train_{number}_a_1"
        tiny.add(volume)
        save_nifti(tiny.ts_path(volume, "train"), np.ones((19, 17, 5), np.uint8), tiny.affine())
    (tiny.root / "dataset" / "metadata" / "no_chest_train.txt").write_text("train_4_a_1.nii.gz\n")
    publish(hub, tiny.root)


def test_what_is_downloaded_is_what_ct_rate_reads(start_hub, invoke, tiny, tmp_path, save_nifti) -> None:
    hub = start_hub(CT_RATE)
    publish_ct_rate(hub, tiny, save_nifti)
    out = tmp_path / "CT-RATE"
    answer = invoke("ct-rate", "--out", out, "--split", "train", "--patients", "2:4", "--label-maps")
    assert answer.exit_code == 0, answer.output
    sources, rejected = find_ct_rate(out, "train")
    assert [source.volume for source in sources] == ["train_2_a_1", "train_3_a_1"]
    assert [item.volume for item in rejected] == ["train_4_a_1"]
    for source in sources:
        assert source.ct.path == out / tiny.path(source.volume, "train").relative_to(tiny.root)
        assert source.ts == out / tiny.ts_path(source.volume, "train").relative_to(tiny.root)
        assert source.labels is not None
        assert source.form == "v2"
    assert not (out / tiny.path("train_1_a_1", "train").relative_to(tiny.root)).exists()
    assert re.search(r"files fetched +│ +9", answer.stdout), answer.stdout
    assert re.search(
        rf"{CT_RATE} at c0ffee00: 9 files to fetch, which take [\d.]+ kB of .* free; 0 are there\.",
        answer.stderr,
    )
    assert "HTTP Request" not in answer.output


def test_what_is_downloaded_is_what_the_annotations_are_read_from(
    start_hub, invoke, tmp_path, write_rex
) -> None:
    hub = start_hub(REX)
    masks = np.ones((1, 19, 17, 5), np.uint8)
    listing, _ = write_rex({"train_2_a_1": masks}, {"train_2_a_1": ["2d"]}, np.diag([-0.7, -0.8, 1.5, 1]))
    publish(hub, listing.parent)
    out = tmp_path / "ReX"
    answer = invoke("rexgroundingct", "--out", out)
    assert answer.exit_code == 0, answer.output
    annotations = read_annotations(out / "dataset.json", out / "segmentations")
    assert annotations["train_2_a_1"].path.read_bytes() == hub.files["segmentations/train_2_a_1.nii.gz"]


def test_rad_chestct_comes_from_the_copy_that_is_named(start_hub, invoke, tmp_path) -> None:
    hub = start_hub("clinic/RAD")
    hub.files = {name: name.encode() for name in ("Summary_3630.csv", "trn00001.npz", "val00002.npz")}
    answer = invoke("rad-chestct", "--repo-id", "clinic/RAD", "--out", tmp_path / "RAD", "--split", "valid")
    assert answer.exit_code == 0, answer.output
    assert {path.name for path in (tmp_path / "RAD").iterdir()} == {
        ".download",
        "Summary_3630.csv",
        "val00002.npz",
    }


def test_tables_come_without_volumes(start_hub, invoke, tiny, tmp_path, save_nifti) -> None:
    hub = start_hub(CT_RATE)
    publish_ct_rate(hub, tiny, save_nifti)
    assert invoke("ct-rate", "--out", tmp_path / "out", "--tables-only", "--label-maps").exit_code == 0
    fetched = {path.name for path in (tmp_path / "out" / "dataset").rglob("*") if path.is_file()}
    tables = {"train_metadata.csv", "no_chest_train.txt", "train_predicted_labels.csv"}
    assert fetched == tables


def test_a_failed_file_is_printed_listed_and_a_failure(start_hub, invoke, tiny, tmp_path, save_nifti) -> None:
    hub = start_hub(CT_RATE)
    publish_ct_rate(hub, tiny, save_nifti)
    lost = tiny.path("train_2_a_1", "train").relative_to(tiny.root).as_posix()
    hub.corrupt = {lost}
    command = ("ct-rate", "--out", tmp_path / "out", "--split", "train", "--limit", 3)
    answer = invoke(*command)
    assert answer.exit_code == 1
    assert re.search(r"files fetched +│ +5", answer.stdout)
    assert f"{lost}: it does not have the" in answer.stderr
    table = (tmp_path / "out" / "failed.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "path,reason"
    assert [line.split(",")[0] for line in table[1:]] == [lost]
    hub.corrupt = set()
    again = invoke(*command)
    assert again.exit_code == 0
    assert re.search(r"files fetched +│ +1", again.stdout)
    assert re.search(r"there before +│ +5", again.stdout)
    assert not (tmp_path / "out" / "failed.csv").exists()


def test_mistakes_end_in_one_line(start_hub, tmp_path, mistake) -> None:
    hub = start_hub(CT_RATE)
    hub.files = {"dataset/metadata/train_metadata.csv": b"", "dataset/train_fixed/a/train_1_a_1.nii.gz": b""}
    for arguments, message in (
        (["rad-chestct"], "--repo-id must name a copy of RAD-ChestCT"),
        (["rexgroundingct", "--label-maps"], "--label-maps and --form are for ct-rate only"),
        (["ct-rate", "--split", "test"], "split must be one of ('train', 'valid') for ct-rate, got 'test'."),
        (["ct-rate", "--patients", "9:1"], "patients must be numbers and ranges such as 1:100,205"),
        (["ct-rate", "--volumes", "train_7_*"], f"'{CT_RATE}' has none of these volumes"),
        (["ct-rate", "--repo-id", "a/b"], f"No dataset 'a/b' on {hub.url} (status 404)"),
    ):
        assert message in mistake("download", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_download_goes_on(start_hub, tiny, tmp_path, save_nifti) -> None:
    """Kill -9 in the middle of the last file; the processes find the hub by HF_ENDPOINT alone."""
    hub = start_hub(CT_RATE)
    publish_ct_rate(hub, tiny, save_nifti, num_patients=3)
    paths = [tiny.path(f"train_{n}_a_1", "train").relative_to(tiny.root).as_posix() for n in (1, 2, 3)]
    hub.stall[paths[-1]] = threading.Event()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_prep", "download", "ct-rate", "--out", str(out), "--jobs", "1"]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "COLUMNS": "200",
    }
    environment.pop("HF_HUB_DISABLE_TELEMETRY")
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if hub.asked("GET", paths[-1]):
                break
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert [(out / path).is_file() for path in paths] == [True, True, False]
    hub.stall.pop(paths[-1]).set()
    again = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0, again.stderr
    for path in paths:
        assert (out / path).read_bytes() == hub.files[path]
    assert [len(hub.asked("GET", path)) for path in paths] == [1, 1, 2]
    assert re.search(r"files fetched +│ +1", again.stdout), again.stdout
    assert sorted(path.name for path in (out / ".download").iterdir()) == [".lock", "verified.csv"]
    assert not [path for path, _ in hub.headers if not re.match("/(api/datasets|datasets|store)/", path)]
    assert not [headers for _, headers in hub.headers if "torch" in headers.get("user-agent", "")]
