"""The pace of a run, against what the test's own clock allows."""

import time

import pytest
import torch
from ignite.engine import Engine, Events

from common.handlers.throughput import Throughput

STEP_S, WAIT_S = 0.02, 0.01


def slow_batches():
    while True:
        time.sleep(WAIT_S)
        yield 0


def run(steps: int, start: int = 0, **options) -> list[dict[str, float]]:
    engine, seen = Engine(lambda engine, batch: time.sleep(STEP_S)), []
    engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", start))
    handler = Throughput(
        log_every=4, items_per_step=10, rate_name="views_per_second", device=torch.device("cpu"), **options
    )
    handler.attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(dict(e.state.metrics)))
    engine.run(slow_batches(), max_epochs=1, epoch_length=steps)
    return seen


def test_rate_and_wait_are_those_of_the_steps_since_the_last_measurement():
    last = run(steps=8)[-1]
    # the machine may be slower than asked to be, never faster
    assert 0 < last["views_per_second"] <= 10 / (STEP_S + WAIT_S)
    assert 0 < last["data_wait_share"] < 1
    assert last["data_wait_share"] >= 0.9 * WAIT_S * last["views_per_second"] / 10
    assert last.keys() == {"views_per_second", "data_wait_share"}


def test_it_measures_at_the_first_step_and_every_few():
    rates = [metrics["views_per_second"] for metrics in run(steps=8)]
    assert len(set(rates)) == 3  # steps 1, 4 and 8


def test_a_resumed_run_counts_its_own_steps_only():
    assert run(steps=8, start=6)[-1]["views_per_second"] <= 10 / (STEP_S + WAIT_S)


def test_mfu_is_the_share_of_the_peak():
    last = run(steps=4, flops_per_step=3e9, peak_flops=1e12)[-1]
    assert last["mfu"] == pytest.approx(last["views_per_second"] / 10 * 3e9 / 1e12)
