"""A picture of the views a run trains on, drawn from its first batch."""

from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from common.reports.contact_sheet import contact_sheet
from common.transforms.hounsfield import HUWindow


class ViewSheet:
    """Draw the first batch: every view with its guidance point and masks.

    Args:
        path: PNG to write.
        hu_window: window the picture is shown in.
    """

    def __init__(self, path: str | Path, hu_window: HUWindow) -> None:
        self.path = Path(path)
        self.hu_window = hu_window

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self._draw)

    def _draw(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            batch: Any = engine.state.batch
            contact_sheet(batch, self.hu_window, self.path)
