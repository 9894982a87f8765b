"""What a user reads last is what to mend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.run.short_errors import first_cause

REPOSITORY = Path(__file__).resolve().parents[3]
WRAPPED = """
from common.run.short_errors import short_errors
short_errors()
try:
    raise {error}
except Exception as inner:
    raise RuntimeError("Failed to instantiate component") from inner
"""


def stderr_of(error: str, **environment: str) -> str:
    script = WRAPPED.format(error=error)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    ).stderr


@pytest.mark.parametrize("error", ["ValueError('slab_mm must be positive.')", "KeyError('no such window.')"])
def test_a_wrapped_user_error_is_one_line(error):
    kind, message = error[:-1].split("(")
    assert stderr_of(error) == f"{kind}: {message[1:-1]} (DALE_CT_TRACEBACK=1 shows where.)\n"


def test_other_errors_and_those_asked_for_keep_their_traceback():
    assert "Traceback" in stderr_of("ZeroDivisionError('ours')")
    assert "Traceback" in stderr_of("ValueError('mend me')", DALE_CT_TRACEBACK="1")


def test_the_line_is_ours_and_not_the_librarys_that_ours_was_raised_from():
    ours = ValueError("'a.tar' is damaged at slice 3.")
    ours.__cause__ = ValueError("Blosc2 frame")
    wrapped = RuntimeError("Failed to instantiate component")
    wrapped.__cause__ = ours
    assert first_cause(wrapped) is ours


def test_an_error_that_is_the_users_nowhere_is_none():
    error = RuntimeError("Failed to instantiate component")
    error.__cause__ = ZeroDivisionError()
    assert first_cause(error) is None


def test_a_components_other_error_is_shown_without_what_monai_wraps_around_it():
    script = WRAPPED.format(error="ZeroDivisionError('in the component')")
    inner = "raise RuntimeError(\"Failed to instantiate component 'x' with keywords: a\") from inner"
    outer = "raise RuntimeError('Failed to evaluate ConfigExpression') from outer"
    script = script.replace(
        'raise RuntimeError("Failed to instantiate component") from inner',
        f"""try:
        {inner}
    except RuntimeError as outer:
        {outer}""",
    )
    said = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True
    ).stderr
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("ZeroDivisionError: in the component")
    assert "Failed to" not in said


@pytest.mark.parametrize(
    "error", ["PermissionError(13, 'Permission denied', '/a')", "BlockingIOError('in use')"]
)
def test_an_error_of_the_system_is_one_line(error):
    (line,) = stderr_of(error).splitlines()
    assert line.startswith(error.split("(")[0])
    assert "/a" in line or "in use" in line
