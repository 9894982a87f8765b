"""Cohorts are written by processes of their own here, which are stopped and killed."""

import hashlib
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Client
from typer.testing import Result

from common.ct.geometry import EXCLUDED, RejectedVolume
from common.shards.index import index_path, load_index
from common.shards.shards import PARTS, ShardSet
from data_prep.cluster import dask_client
from data_prep.commands import prepare as module
from data_prep.nifti import find_volumes
from data_prep.write_shards import Summary, write_shards

REPOSITORY = Path(__file__).resolve().parents[3]
NUM_VOLUMES = 24
Save = Callable[[Path, np.ndarray, np.ndarray], Path]
Invoke = Callable[..., Result]


@pytest.fixture
def scans(tmp_path: Path, save_nifti: Save, tiny: Any) -> Path:
    """Scans in a folder whose name needs quotes; writing every sixth takes long enough to be caught at it."""
    rng = np.random.default_rng(0)
    for number in range(NUM_VOLUMES):
        shape = (256, 255, 200) if number % 6 == 4 else (64, 63, 30)
        hu = rng.integers(-1000, 1000, shape).astype(np.int16)
        save_nifti(tmp_path / "my scäns" / f"scan-{number:02d}.nii.gz", hu, tiny.affine())
    return tmp_path / "my scäns"


def write(scans: Path, out: Path, client: Client, **options: Any) -> Summary:
    sources, rejected = find_volumes(scans, "train", None)
    return write_shards(sources, rejected, out, "train", client, slices_per_shard=240, **options)


def checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def start_and_freeze(scans: Path, out: Path) -> subprocess.Popen:
    """Start the command as a terminal would; freeze it once 3 more volumes are written and one half written.

    It is frozen first and looked at then, however slow the machine: a volume that became whole in between
    lets it go on until the next.
    """
    command = [sys.executable, "-m", "data_prep", "nifti", str(scans), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--slices-per-shard", "240"],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    before = num_written(out)
    while process.poll() is None:
        if num_written(out) >= before + 3 and is_half_written(out):
            os.killpg(process.pid, signal.SIGSTOP)
            if is_half_written(out):
                return process
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError(f"ended with {process.returncode} before it was caught: {process.stderr.read()}")


def num_written(out: Path) -> int:
    """Volumes in parts of shards, and in whole shards; parts go when their shard is whole."""
    parts = [path for path in out.rglob("*.npz") if path.parent != out]
    shards = [path for path in out.glob("*.tar") if index_path(path).exists()]  # the tar comes first
    return len(parts) + sum(len(load_index(path).volume) for path in shards)


def is_half_written(out: Path) -> bool:
    """Whether a tar in the making has some bytes but no index yet."""
    asides = list((out / PARTS).glob("*.tar"))
    return any(path.exists() and path.stat().st_size and not index_path(path).exists() for path in asides)


def test_a_run_that_was_stopped_and_killed_goes_on_to_the_same_bytes(
    scans: Path, tmp_path: Path, dask: Client
) -> None:
    whole = write(scans, tmp_path / "whole", dask)
    out = tmp_path / "out"

    process = start_and_freeze(scans, out)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the command and its workers
    os.killpg(process.pid, signal.SIGCONT)
    printed = process.communicate(timeout=120)[1]
    assert process.returncode == 130, printed
    assert printed.rstrip().endswith("Stopped. Run the same command again to resume.")

    process = start_and_freeze(scans, out)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    os.killpg(process.pid, signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert psutil.wait_procs(workers, timeout=120)[1] == []  # workers do not outlive their client

    assert not (out / "manifest.csv").exists()
    summary = write(scans, out, dask)
    assert summary.num_resumed >= 6
    assert summary.num_done == NUM_VOLUMES - summary.num_resumed
    assert summary[:6] == whole[:6]
    assert checksums(out) == checksums(tmp_path / "whole")


def test_workers_that_joined_a_scheduler_share_a_run_and_one_may_be_lost(
    scans: Path,
    tmp_path: Path,
    dask: Client,
    dask_scheduler: tuple[str, subprocess.Popen],
    dask_command: Callable[..., subprocess.Popen],
) -> None:
    """Two processes as two machines would run them; then the nanny of one is killed, and it with her."""
    write(scans, tmp_path / "whole", dask)
    address, _ = dask_scheduler
    nannies = [dask_command("worker", address, "--host", "127.0.0.1", "--nthreads", "1") for _ in range(2)]
    lost: list[int] = []

    def kill_a_nanny(stage: str, done: int, total: int) -> None:
        if stage == "Writing volumes" and done == 12:
            nannies[0].kill()
            lost.append(done)

    with dask_client(address) as client:
        client.wait_for_workers(2, timeout=60)
        client.run(importlib.import_module, "data_prep.write_shards")  # that neither is still importing
        summary = write(scans, tmp_path / "out", client, progress=kill_a_nanny)
    assert lost == [12]
    assert summary.num_workers == 2
    assert (summary.num_volumes, summary.rejected) == (NUM_VOLUMES, ())
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


@pytest.mark.parametrize(("allowed", "status"), [(None, 1), (0.2, 1), (0.25, 0), (1, 0)])
def test_too_many_rejected_volumes_are_a_failure(
    allowed: float | None, status: int, tiny: Any, tmp_path: Path, invoke: Invoke
) -> None:
    for n in range(1, 5):
        tiny.add(f"train_{n}_a_1")
    tiny.path("train_2_a_1", "train").write_bytes(b"<html>")
    options = [] if allowed is None else ["--max-rejected", allowed]
    answer = invoke("ct-rate", "--root", tiny.root, "--split", "train", "--out", tmp_path / "out", *options)
    assert answer.exit_code == status
    assert re.search(r"left out: unreadable +│ +1", answer.stdout)
    assert "rejected.csv" in answer.stderr
    limit = "1.00%" if allowed is None else f"{allowed:.2%}"
    said = (
        f"rejected volumes must be at most {limit}, got 25.00% (1 volumes). Mend them, or raise"
        in answer.stderr
    )
    assert said == (status == 1)
    assert len(ShardSet(tmp_path / "out", "train").volumes) == 3


def test_the_summary_says_what_was_done_and_how_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures by hand: 30 volumes in 45 s are 40 a minute; 123.4 MB of 5 volumes are 24.7 each."""
    rejected = (RejectedVolume("a", "mask", "x"), RejectedVolume("b", EXCLUDED, "y"))
    summary = Summary(
        num_volumes=5,
        num_slices=1234,
        num_ts=4,
        num_rex=3,
        num_doubtful=0,
        num_shards=2,
        num_bytes=123_400_000,
        num_resumed=17,
        num_done=30,
        num_resumed_shards=1,
        rejected=rejected,
        num_workers=8,
        peak_worker_bytes=1_500_000_000,
        seconds=45.0,
    )
    monkeypatch.setenv("COLUMNS", "100")
    module._finish(summary, tmp_path, max_rejected=0.5)
    rows = dict(re.findall(r"│ (.+?) +│ +(\S+) │", capsys.readouterr().out))
    assert rows == {
        "volumes": "5",
        "with TotalSegmentator ids": "4",
        "annotated by ReXGroundingCT": "3",
        "slices": "1,234",
        "shards": "2",
        "MB": "123.4",
        "MB a volume": "24.7",
        "done before: volumes": "17",
        "done before: shards": "1",
        "volumes a minute": "40.0",
        "workers": "8",
        "peak memory of a worker, MB": "1,500",
        "left out: mask": "1",
        f"left out: {EXCLUDED}": "1",
    }
    module._finish(summary._replace(num_workers=0, rejected=()), tmp_path, max_rejected=1)
    assert "a minute" not in capsys.readouterr().out
