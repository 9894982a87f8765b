import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver

import psutil
import pytest
from rich.console import Console
from rich.progress import Progress

from study import run
from study.stages import REPOSITORY, Stage


@pytest.fixture
def progress() -> Progress:
    return Progress(console=Console(stderr=True))


@pytest.fixture
def module(tmp_path) -> Callable[[str, str], list[str]]:
    """Return ``write(name, code)``, which returns the command that runs the code."""

    def write(name: str, code: str) -> list[str]:
        (tmp_path / f"{name}.py").write_text(code)
        return [name]

    return write


def test_commands_run_in_order_and_all_they_print_is_in_the_log(tmp_path, progress, module):
    second = "import sys; print('second', sys.argv[1:], sys.stdin.read(), file=sys.stderr)"
    stage = Stage("one", [module("first", "print('first')"), [*module("other", second), "word"]])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run.run_stage(stage, tmp_path / "logs" / "one.log", environment, progress)
    lines = (tmp_path / "logs" / "one.log").read_text().splitlines()
    assert lines == ["$ python -m first", "first", "$ python -m other word", "second ['word'] "]


def test_a_command_that_fails_ends_the_study_with_the_end_of_its_log(tmp_path, progress, module):
    broken = module("broken", "print('before'); raise SystemExit('the reason')")
    stage = Stage("broken", [broken, module("never", "print('never')")])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(SystemExit) as stopped:
        run.run_stage(stage, tmp_path / "broken.log", environment, progress)
    message = str(stopped.value)
    assert "the reason" in message
    assert "Stage 'broken' failed (exit 1): python -m broken" in message
    assert str(tmp_path / "broken.log") in message
    assert "never" not in (tmp_path / "broken.log").read_text()


def test_a_stage_is_another_when_a_config_of_ours_or_what_it_builds_on_is(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REPOSITORY", tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "train.json").write_text("{}")
    made = f"['demo/train.json','study/out/small/made.json','{tmp_path}/study/out/made.json']"
    stages = [Stage("first", [["x", "--config_file", made]])]
    stages += [Stage("second", [["y"]], ("first",)), Stage("other", [["z"]])]
    before = run.keys_of(stages)
    (tmp_path / "demo" / "train.json").write_text('{"lr": 1}')
    after = run.keys_of(stages)
    assert [name for name in before if before[name] != after[name]] == ["first", "second"]


def test_the_newest_state_of_a_progress_bar_is_the_last_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("old\n 10%|#  |\r 20%|## |\r\n\n")
    assert run.last_line(log, 0) == "20%|## |"
    assert run.last_line(log, log.stat().st_size) == ""
    log.write_text("x" * 5000)
    assert run.last_line(log, 0) == "x" * run.SHOWN_CHARACTERS


def test_a_stage_is_done_while_its_key_stays(tmp_path):
    assert run.seconds_of("table I a", "key", tmp_path) is None
    run.write_record("table I a", "key", 61.6, tmp_path)
    assert run.seconds_of("table I a", "key", tmp_path) == 62
    assert run.seconds_of("table I a", "other", tmp_path) is None
    record = json.loads((tmp_path / "done" / "table_I_a.json").read_text())
    assert record["stage"] == "table I a"
    assert "CPU core" in record["hardware"]


STUDY = """
import sys
from pathlib import Path
from study import run, stages
run.all_stages = lambda size, out, amp: [
    stages.Stage("quick", [["quick"]]),
    stages.Stage("slow", [["slow"]], ("quick",)),
]
run.keys_of = lambda stages: dict.fromkeys((stage.name for stage in stages), "key")
run.environment_of = lambda out: {"PYTHONPATH": "{here}"}
run.main(size="small", out=Path("{here}/out"), only="", show="--list" in sys.argv)
"""
SLOW = """
import os, pathlib, time
pathlib.Path("{here}/started").write_text(str(os.getpid()))
time.sleep(0 if pathlib.Path("{here}/go").exists() else 3600)
"""


def test_a_study_that_is_told_to_end_stops_its_command_and_goes_on_later(tmp_path, module):
    command = [sys.executable, "-c", STUDY.replace("{here}", str(tmp_path))]
    module("quick", "print(1)")
    module("slow", SLOW.replace("{here}", str(tmp_path)))
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "same command again" in output
    assert not psutil.pid_exists(int((tmp_path / "started").read_text()))
    listed = subprocess.run(
        [*command, "--list"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split("  ")[-1] for line in listed.splitlines()] == ["quick", "slow"]
    assert " min  quick" in listed
    assert "to do  slow" in listed
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "Done: 2 stages" in again.stderr
    log = (tmp_path / "out" / "logs" / "quick.log").read_text()
    assert log.count("$ python") == 1


def test_a_study_whose_server_is_killed_stops_its_command_and_says_so(tmp_path, module, progress):
    module("slow", SLOW.replace("{here}", str(tmp_path)))

    def kill() -> None:
        while not (tmp_path / "started").is_file() or not (tmp_path / "started").read_text():
            time.sleep(0.05)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    stage = Stage("slow", [["slow"]])
    environment = {"PYTHONPATH": str(tmp_path)}
    with pytest.raises(SystemExit, match="was killed"):
        run.run_stage(stage, tmp_path / "slow.log", environment, progress)
    command = int((tmp_path / "started").read_text())
    deadline = time.monotonic() + 300
    while psutil.pid_exists(command) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(command)
    run.run_stage(Stage("next", [module("next", "")]), tmp_path / "next.log", environment, progress)
