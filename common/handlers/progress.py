"""Progress bar of a run: step, rate, time left and the terms of the loss."""

from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from tqdm import tqdm


class Progress:
    """Show one bar over all steps of a run, on rank 0.

    Args:
        log_every: steps between two updates, since reading the loss waits for the device.
        names: terms of ``engine.state.output[0]`` and of ``engine.state.metrics`` to show.
        unit: what one iteration is, "step" or "volume".
    """

    def __init__(self, log_every: int, names: list[str], unit: str = "step") -> None:
        self.log_every = log_every
        self.names = names
        self.unit = unit

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine; does nothing on ranks other than 0."""
        if idist.get_rank() != 0:
            return
        self.bar: tqdm | None = None
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _update(self, engine: Engine) -> None:
        state: Any = engine.state
        step, total = state.iteration, state.max_epochs * state.epoch_length
        if self.bar is None:
            self.bar = tqdm(total=total, initial=step - 1, unit=self.unit, dynamic_ncols=True)
        if step % self.log_every and step != total:
            return
        known = {**state.metrics, **state.output[0]}
        shown = {name: f"{float(known[name]):.4g}" for name in self.names if name in known}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def _close(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
