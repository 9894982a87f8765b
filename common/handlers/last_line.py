"""The last line of a run: what it wrote, and where."""

import logging
from collections.abc import Mapping
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events

logger = logging.getLogger(__name__)


class LastLine:
    """Say at the end of a run on rank 0 what it wrote, or how far it came before it was stopped.

    Args:
        written: what the run writes, such as "encoder", to where it is.
    """

    def __init__(self, written: Mapping[str, str | Path]) -> None:
        self.written = written

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine, after all handlers that write or show something."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.COMPLETED, self._say)

    def _say(self, engine: Engine) -> None:
        if getattr(engine.state, "stopped_early", False):
            logger.warning("Stopped: saved step %d. Run the same command to resume.", engine.state.iteration)
        else:
            log_written(self.written)


def log_written(written: Mapping[str, str | Path]) -> None:
    """Log one line that says what was written and where.

    Args:
        written: what, to where.
    """
    logger.info("Done: %s.", ", ".join(f"{what} in '{where}'" for what, where in written.items()))
