import io
import re

import pytest
from rich.console import Console

from data_prep.commands import console as module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the bars go by; the test moves them."""
    now = [0.0]
    progress = module.Progress

    def with_clock(*columns: object, **options: object) -> object:
        return progress(*columns, **options, get_time=lambda: now[0], auto_refresh=False)

    monkeypatch.setattr(module, "Progress", with_clock)
    monkeypatch.setattr(module, "console", Console(file=io.StringIO(), width=120, force_terminal=True))
    return now


def printed() -> str:
    """What is on the screen last, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", module.console.file.getvalue())


def test_bars_show_done_total_rate_and_the_time_left(clock) -> None:
    """By hand: 60 volumes in 30 s are 120 a minute; 120 more take a minute."""
    with module.progress_bars() as show:
        show("Reading headers", 0, 7)
        show("Writing volumes", 0, 180)
        for second in range(1, 31):
            clock[0] = second
            show("Writing volumes", 2 * second, 180)
    line = printed().splitlines()[-1]
    assert "Writing volumes" in line
    assert "60/180" in line.replace(" ", "")
    assert "120/min" in line
    assert "0:01:00" in line


def test_what_was_done_before_is_not_of_the_rate(clock) -> None:
    """1,000 volumes of an earlier run, then one a second."""
    with module.progress_bars() as show:
        show("Writing volumes", 1000, 1060)
        for second in range(1, 31):
            clock[0] = second
            show("Writing volumes", 1000 + second, 1060)
    assert "60/min" in printed().splitlines()[-1]


def test_a_stage_that_has_just_begun_has_no_rate(clock) -> None:
    with module.progress_bars() as show:
        show("Reading headers", 0, 7)
    assert "/min" not in printed()
