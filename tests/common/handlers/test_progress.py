"""The bar counts all steps of a run, and goes on after a resume."""

from ignite.engine import Engine, Events

from common.handlers.progress import Progress


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
