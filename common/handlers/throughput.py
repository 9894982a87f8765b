"""How fast a run is: items a second, how long it waits for data, and what it asks of the device."""

import time

import torch
from ignite.engine import Engine, Events


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
