"""Ctrl-C and SIGTERM end a run in one line, with the exit status that a shell expects."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """The user (Ctrl-C) or the cluster (SIGTERM) has asked this process to end.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}.")
        self.exit_status = 128 + number


def raise_stopped(number: int) -> None:
    """Leave whatever the main thread is doing; a second signal does not wait for it to tidy up.

    Args:
        number: number of the signal.

    Raises:
        Stopped: always.
    """
    on_stop(lambda again: os._exit(128 + again))
    raise Stopped(number)


def on_stop(act: Callable[[int], None]) -> None:
    """Call a function with the number of the signal when this process gets Ctrl-C or SIGTERM.

    Processes forked from this one, such as the workers of a DataLoader, ignore Ctrl-C, which a terminal sends
    to all of them: they end with this one. Outside the main thread, where Python allows no handlers, the
    signals keep their meaning.

    Args:
        act: called in the main thread, between two of its instructions.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            act(number)
        elif number == signal.SIGTERM:
            os._exit(128 + number)

    with suppress(ValueError):
        signal.signal(signal.SIGINT, handle)
        signal.signal(signal.SIGTERM, handle)


def exit_if_stopped(engine: Any) -> None:  # noqa: ANN401 (Ignite's)
    """End the process with the signal's status, 130 or 143, if the run was stopped before its last step.

    Args:
        engine: engine that has run; a :class:`common.handlers.checkpoint.Checkpoint` stops it.
    """
    status = getattr(engine.state, "exit_status", 0)
    if status:
        sys.exit(status)
