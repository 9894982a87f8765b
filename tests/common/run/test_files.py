import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.run.files import atomic_file, claim, claimed, must_exist


def test_the_name_appears_when_everything_is_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a.bin").exists()
        file.write(b" and half")
    assert (tmp_path / "a.bin").read_bytes() == b"half and half"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("older")
    with pytest.raises(TypeError, match="must be str"), atomic_file(tmp_path / "a.txt", "w") as file:
        file.write(b"newer")
    assert (tmp_path / "a.txt").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_options_are_those_of_open(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt", "w", newline="\r\n", encoding="utf-16-le") as file:
        file.write("x\n")
    assert (tmp_path / "a.txt").read_bytes() == b"x\0\r\0\n\0"


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from common.run.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", code, str(tmp_path / "a.bin")]
    killed = subprocess.run(command, cwd=root, check=False, env={**os.environ, "PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin.partial"]
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"whole")
    assert (tmp_path / "a.bin").read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_writers_of_one_file_wait_for_one_another(tmp_path: Path) -> None:
    def write(letter: str) -> None:
        with atomic_file(tmp_path / "a.txt", "w") as file:
            for _ in range(50):
                file.write(letter * 1000)
                file.flush()
        assert set((tmp_path / "a.txt").read_text()) < set("abcdef")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, "abcdef"))
    text = (tmp_path / "a.txt").read_text()
    assert len(text) == 50_000
    assert len(set(text)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import os, sys, time; from common.run.files import claim; claim(sys.argv[1]);"
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


def test_a_path_that_is_not_there_is_named_with_its_option(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"skip_list: '{tmp_path / 'no.txt'}'.*--skip_list"):
        must_exist(dataset_dir=tmp_path, subset_csv=None, skip_list=tmp_path / "no.txt")


def test_files_folders_and_options_not_used_pass(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("")
    must_exist(dataset_dir=tmp_path, subset_csv=None, skip_list=str(tmp_path / "list.txt"))
