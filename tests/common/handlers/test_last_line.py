import logging

import pytest
from ignite.engine import Engine, Events

from common.handlers.last_line import LastLine


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
