"""Stops are tidy, files whole, folders claimed, and a run ends with one line."""

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.run.process import atomic_file, claim, claimed, end_run, locked

REPOSITORY = Path(__file__).resolve().parents[3]
START = "import os, signal, sys, time; from common.run.config import short_errors; short_errors();"
HOLD = (
    "import os, sys, time; from common.run.process import claim; claim(sys.argv[1]);"
    "child = os.fork(); print(child, flush=True) if child else None; time.sleep(60)"
)


def run(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run([sys.executable, "-c", code, *words], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "status", "word"), [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM")])
def test_a_stop_is_one_line_with_the_shells_status_after_what_must_be_tidied_up(name, status, word):
    code = f"\ntry:\n    os.kill(os.getpid(), signal.{name}); time.sleep(9)\nfinally:\n    print('tidied')"
    ended = run(START + code)
    assert ended.returncode == status
    assert ended.stdout == "tidied\n"
    (line,) = ended.stderr.split("\n")[1:-1]
    assert f"Stopped by {word}." in line
    assert "Traceback" in run(START + code, DALE_CT_TRACEBACK="1").stderr


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("\ntry:\n    {kill}; time.sleep(9)\nexcept Exception: print('kept')", 130),
        (
            "\ntry:\n    try:\n        {kill}; time.sleep(9)\n    finally:\n        {kill}; time.sleep(9)\n"
            "finally:\n    print('late')",
            130,
        ),
    ],
)
def test_a_stop_passes_what_handles_exceptions_and_a_second_signal_does_not_wait(code, status):
    ended = run(START + code.format(kill="os.kill(os.getpid(), signal.SIGINT)"))
    assert (ended.returncode, ended.stdout) == (status, "")


def test_forked_workers_ignore_ctrl_c_and_end_at_sigterm():
    code = """
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGINT)
    print('alive', flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print('late', flush=True)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(START + code).stdout == "alive\n143\n"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_name_appears_when_everything_is_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a.bin").exists()
        file.write(b" and half")
    assert (tmp_path / "a.bin").read_bytes() == b"half and half"
    assert names_in(tmp_path) == ["a.bin"]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("older")
    with pytest.raises(TypeError, match="must be str"), atomic_file(tmp_path / "a.txt", "w") as file:
        file.write(b"newer")
    assert (tmp_path / "a.txt").read_text() == "older"
    assert names_in(tmp_path) == ["a.txt"]


def test_options_are_those_of_open(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.txt", "w", newline="\r\n", encoding="utf-16-le") as file:
        file.write("x\n")
    assert (tmp_path / "a.txt").read_bytes() == b"x\0\r\0\n\0"


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from common.run.process import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'half'); file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert run(code, str(tmp_path / "a.bin")).returncode == -signal.SIGKILL
    assert names_in(tmp_path) == ["a.bin.partial"]
    with atomic_file(tmp_path / "a.bin") as file:
        file.write(b"whole")
    assert (tmp_path / "a.bin").read_bytes() == b"whole"
    assert names_in(tmp_path) == ["a.bin"]


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
    assert names_in(tmp_path) == ["a.txt"]


def test_readers_that_write_what_they_read_lose_nothing_under_a_lock(tmp_path: Path) -> None:
    count = tmp_path / "count.txt"
    count.write_text("0")

    def add_one(_: int) -> None:
        with locked(count):
            number = int(count.read_text())
            time.sleep(0.001)
            count.write_text(str(number + 1))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add_one, range(30)))
    assert count.read_text() == "30"


@pytest.fixture
def hold(request: pytest.FixtureRequest):
    """Claim a folder in another process, which has a child as a DataLoader has workers."""

    def start(folder: Path, **environment: str) -> subprocess.Popen:
        env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
        command = [sys.executable, "-c", HOLD, str(folder)]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        process.child = int(process.stdout.readline())
        request.addfinalizer(process.wait)
        request.addfinalizer(process.kill)
        request.addfinalizer(lambda: os.kill(process.child, signal.SIGKILL))
        return process

    return start


def test_a_folder_in_use_is_refused_with_the_process_named_until_that_is_killed(hold, tmp_path: Path) -> None:
    holder = hold(tmp_path / "out")
    with pytest.raises(BlockingIOError) as refused:
        claim(tmp_path / "out")
    for part in (f"process {holder.pid} on {os.uname().nodename}", f"since {time.strftime('%Y-%m')}"):
        assert part in str(refused.value)
    assert str(tmp_path / "out") in str(refused.value)
    claim(tmp_path / "elsewhere")
    holder.kill()
    holder.wait()
    with claimed(tmp_path / "out"):  # while the child that it forked still lives
        os.kill(holder.child, 0)


def test_ranks_of_one_run_share_the_folder_of_rank_0(hold, tmp_path: Path, monkeypatch) -> None:
    holder = hold(tmp_path, RANK="0")
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BlockingIOError, match=f"process {holder.pid} "):
        claim(tmp_path)


def test_a_process_may_claim_its_folder_again_but_not_use_it_twice_at_once(tmp_path: Path) -> None:
    claim(tmp_path / "a")
    claim(tmp_path / "b" / ".." / "a")
    with claimed(tmp_path / "c"):
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=f"process {os.getpid()} "), claimed(tmp_path / "c"):
                pass
    with claimed(tmp_path / "c"):
        pass


def test_a_holder_that_cannot_be_read_is_another_process(hold, tmp_path: Path) -> None:
    hold(tmp_path)
    (tmp_path / ".lock").write_text('{"pid": 1')
    with pytest.raises(BlockingIOError, match="in use by another process"):
        claim(tmp_path)


WRITTEN = {"encoder": "a/model.safetensors", "results": "b.csv"}


def lines_of_end(caplog, engine=None) -> list[str]:
    caplog.set_level(logging.INFO, "common")
    end_run(WRITTEN, engine)
    return [record.getMessage() for record in caplog.records if record.name.startswith("common")]


@pytest.mark.parametrize("engine", [None, SimpleNamespace(state=SimpleNamespace(iteration=3))])
def test_a_run_ends_with_one_line_that_says_what_is_where(caplog, engine):
    (line,) = lines_of_end(caplog, engine)
    assert "encoder in 'a/model.safetensors', results in 'b.csv'" in line


def test_a_stopped_run_says_its_step_claims_nothing_and_ends_with_its_status(caplog):
    with pytest.raises(SystemExit) as left:
        lines_of_end(caplog, SimpleNamespace(state=SimpleNamespace(iteration=3, exit_status=143)))
    assert left.value.code == 143
    assert "step 3" in caplog.text
    assert "model.safetensors" not in caplog.text


def test_other_ranks_are_silent(caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    assert lines_of_end(caplog) == []
