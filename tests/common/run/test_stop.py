"""What Ctrl-C and SIGTERM do to a process and to those forked from it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.run.stop import exit_if_stopped

ROOT = Path(__file__).resolve().parents[3]
START = "import os, signal, sys, time; from common.run.short_errors import short_errors; short_errors();"


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", START + code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "status", "word"), [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM")])
def test_a_stop_is_one_line_with_the_shells_status_after_what_must_be_tidied_up(name, status, word):
    code = f"\ntry:\n    os.kill(os.getpid(), signal.{name}); time.sleep(9)\nfinally:\n    print('tidied')"
    ended = run(code)
    assert ended.returncode == status
    assert ended.stdout == "tidied\n"
    (line,) = ended.stderr.split("\n")[1:-1]
    assert f"Stopped by {word}." in line
    assert "Traceback" in run(code, DALE_CT_TRACEBACK="1").stderr


def test_a_stop_passes_what_handles_exceptions():
    code = "\ntry:\n    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\nexcept Exception: print('kept')"
    assert (run(code).returncode, run(code).stdout) == (143, "")


def test_a_second_signal_does_not_wait():
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    code = f"\ntry:\n    {kill}; time.sleep(9)\nfinally:\n    {kill}; print('late')"
    assert (run(code).returncode, run(code).stdout) == (130, "")


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
    assert run(code).stdout == "alive\n143\n"


def test_a_run_that_was_stopped_ends_with_its_status_and_another_goes_on():
    exit_if_stopped(SimpleNamespace(state=SimpleNamespace(iteration=3)))
    with pytest.raises(SystemExit) as left:
        exit_if_stopped(SimpleNamespace(state=SimpleNamespace(exit_status=143)))
    assert left.value.code == 143
