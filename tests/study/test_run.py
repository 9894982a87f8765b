import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from study import run
from study.stages import REPOSITORY, Stage


@pytest.fixture
def progress() -> Progress:
    return Progress(console=Console(stderr=True))


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_commands_run_in_order_and_all_they_print_is_in_the_log(tmp_path, progress):
    stage = Stage("one", [python("print('first')"), python("import sys; print('second', file=sys.stderr)")])
    run.run_stage(stage, tmp_path / "logs" / "one.log", dict(os.environ), progress)
    lines = (tmp_path / "logs" / "one.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("$")] == ["first", "second"]
    assert lines[0] == "$ python -c print('first')"


def test_a_command_that_fails_ends_the_study_with_the_end_of_its_log(tmp_path, progress):
    stage = Stage(
        "broken", [python("print('before'); raise SystemExit('the reason')"), python("print('never')")]
    )
    with pytest.raises(SystemExit) as stopped:
        run.run_stage(stage, tmp_path / "broken.log", dict(os.environ), progress)
    message = str(stopped.value)
    assert "the reason" in message
    assert "Stage 'broken' failed (exit 1)" in message
    assert str(tmp_path / "broken.log") in message
    assert "never" not in (tmp_path / "broken.log").read_text()


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
import sys, time
from pathlib import Path
from study import run, stages
wait = "import time, pathlib; pathlib.Path('{here}/started').touch(); time.sleep(60)"
second = "print(2)" if Path("{here}/go").exists() else wait
run.all_stages = lambda size, out, amp: [
    stages.Stage("quick", [[sys.executable, "-c", "print(1)"]]),
    stages.Stage("slow", [[sys.executable, "-c", second]], ("quick",)),
]
run.keys_of = lambda stages: dict.fromkeys((stage.name for stage in stages), "key")
run.main(size="small", out=Path("{here}/out"), only="", show="--list" in sys.argv)
"""


def test_a_study_that_is_told_to_end_stops_its_command_and_goes_on_later(tmp_path):
    command = python(STUDY.replace("{here}", str(tmp_path)))
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "The same command goes on here" in output
    assert not _running(str(tmp_path / "started"))
    listed = subprocess.run(
        [*command, "--list"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split("  ")[-1] for line in listed.splitlines()] == ["quick", "slow"]
    assert "0.0 min  quick" in listed
    assert "to do  slow" in listed
    (tmp_path / "go").touch()
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "Done: 2 stages" in again.stderr
    log = (tmp_path / "out" / "logs" / "quick.log").read_text()
    assert log.count("$ python") == 1


def _running(text: str) -> bool:
    """Whether a process is left that waits, by what its command line holds."""
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return any(text in line and "time.sleep(60)" in line for line in commands.splitlines())
