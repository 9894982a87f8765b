"""Progress bar of a run: step, rate, time left and the terms of the loss."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
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


class Throughput:
    """Measure the pace of a run between two records and put it into ``engine.state.metrics``.

    ``<rate_name>`` is the number of items a second over all ranks; ``data_wait_share`` the share of the time
    that this rank waited for its batch; ``gpu_memory_gib`` the most memory allocated so far, on a GPU;
    ``mfu`` the share of the device's peak that went into the network, where the peak is known. Attach it
    before the handlers that record metrics.

    Args:
        log_every: iterations between two measurements.
        items_per_step: items that one step over all ranks consumes.
        rate_name: name of their rate, such as "views_per_second".
        device: of this rank.
        flops_per_step: operations of one step on this rank; 0 if nobody counted.
        peak_flops: operations a second that the device can do at best; None if unknown.
    """

    def __init__(
        self,
        log_every: int,
        items_per_step: int,
        rate_name: str,
        device: torch.device,
        flops_per_step: float = 0,
        peak_flops: float | None = None,
    ) -> None:
        self.log_every = log_every
        self.items_per_step = items_per_step
        self.rate_name = rate_name
        self.device = device
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._batch_wanted)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._batch_there)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._measure_if_due)

    def _start(self, engine: Engine) -> None:
        self.last_step, self.last_time, self.waited = engine.state.iteration, time.perf_counter(), 0.0

    def _batch_wanted(self, engine: Engine) -> None:
        self.wanted = time.perf_counter()

    def _batch_there(self, engine: Engine) -> None:
        self.waited += time.perf_counter() - self.wanted

    def _measure_if_due(self, engine: Engine) -> None:
        step = engine.state.iteration
        if step % self.log_every and step != 1:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what follows is the time of finished steps
            engine.state.metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        now = time.perf_counter()
        steps_per_second = (step - self.last_step) / (now - self.last_time)
        engine.state.metrics[self.rate_name] = steps_per_second * self.items_per_step
        engine.state.metrics["data_wait_share"] = self.waited / (now - self.last_time)
        if self.flops_per_step and self.peak_flops:
            engine.state.metrics["mfu"] = steps_per_second * self.flops_per_step / self.peak_flops
        self.last_step, self.last_time, self.waited = step, now, 0.0


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
