"""A folder serves one process at a time, and no lock outlives its process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.run.claim import claim, claimed

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import os, sys, time; from common.run.claim import claim; claim(sys.argv[1]);"
    "child = os.fork(); print(child, flush=True) if child else None; time.sleep(60)"
)


def start(folder: Path, **environment: str) -> subprocess.Popen:
    """Claim a folder in another process, which has a child as a DataLoader has workers."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.child = int(process.stdout.readline())  # type: ignore[attr-defined]
    return process


def test_a_folder_in_use_is_refused_with_the_process_named_until_that_is_killed(tmp_path: Path) -> None:
    holder = start(tmp_path / "out")
    with pytest.raises(BlockingIOError) as refused:
        claim(tmp_path / "out")
    for part in (f"process {holder.pid} on {os.uname().nodename}", f"since {time.strftime('%Y-%m')}"):
        assert part in str(refused.value)
    assert str(tmp_path / "out") in str(refused.value)
    claim(tmp_path / "elsewhere")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path / "out"):  # while the child that it forked still lives
        os.kill(holder.child, 0)  # type: ignore[attr-defined]
    os.kill(holder.child, signal.SIGKILL)  # type: ignore[attr-defined]


def test_ranks_of_one_run_share_the_folder_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = start(tmp_path, RANK="0")
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} "):
        claim(tmp_path)
    os.kill(holder.child, signal.SIGKILL)  # type: ignore[attr-defined]
    holder.kill()
    holder.wait()


def test_a_process_may_claim_its_folder_again_but_not_use_it_twice_at_once(tmp_path: Path) -> None:
    claim(tmp_path / "a")
    claim(tmp_path / "b" / ".." / "a")
    with claimed(tmp_path / "c"):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "), claimed(tmp_path / "c"):
            pass
        with pytest.raises(BlockingIOError, match="in use"), claimed(tmp_path / "c"):  # still
            pass
    with claimed(tmp_path / "c"):
        pass


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path: Path) -> None:
    holder = start(tmp_path)
    (tmp_path / ".lock").write_text('{"pid": 1')
    with pytest.raises(BlockingIOError, match="in use by another process"):
        claim(tmp_path)
    os.kill(holder.child, signal.SIGKILL)  # type: ignore[attr-defined]
    holder.kill()
    holder.wait()
