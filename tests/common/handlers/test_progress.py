"""The bar counts all steps of a run, and goes on after a resume."""

import logging
import time

import pytest
import torch
from ignite.engine import Engine, Events

from common.handlers.progress import LastLine, Progress, Throughput


def shown(capsys, start=0):
    engine = Engine(lambda engine, batch: [{"loss": 0.5}])
    if start:
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", start))
    Progress(log_every=2, names=["loss", "absent"]).attach(engine)
    engine.run([0] * 5, max_epochs=1, epoch_length=5)
    return capsys.readouterr().err


def test_the_bar_reaches_the_last_step_and_shows_the_loss(capsys):
    text = shown(capsys)
    assert "5/5" in text
    assert "loss=0.5" in text


def test_a_resumed_run_starts_at_its_step(capsys):
    text = shown(capsys, start=3)
    assert "3/5" in text
    assert "5/5" in text


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


def said(caplog, stop_at=None):
    caplog.set_level(logging.INFO, "common")

    def stop(engine):
        engine.state.stopped_early = True
        engine.terminate()

    engine = Engine(lambda engine, batch: None)
    if stop_at:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop_at), stop)
    LastLine({"encoder": "a/model.safetensors", "results": "b.csv"}).attach(engine)
    engine.run([0] * 5)
    return [record.getMessage() for record in caplog.records if record.name.startswith("common")]


def test_a_run_ends_with_one_line_that_says_what_is_where(caplog):
    (line,) = said(caplog)
    assert "encoder in 'a/model.safetensors', results in 'b.csv'" in line


def test_a_stopped_run_says_its_step_and_claims_nothing(caplog):
    (line,) = said(caplog, stop_at=3)
    assert "step 3" in line
    assert "model.safetensors" not in line


def test_other_ranks_are_silent(caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    assert said(caplog) == []
