"""A probe that watches the encoder and leaves it alone."""

import pytest
import torch
from ignite.engine import Engine, Events

from common.handlers.online_probe import OnlineProbe

DIM, BATCH = 6, 32


def run(steps: int, probe: OnlineProbe, informative: bool, first: int = 0) -> tuple[Engine, torch.Tensor]:
    """Tokens whose first two dimensions say the first label; the second label is unknown for one volume."""
    encoder = torch.ones(DIM, requires_grad=True)

    def step(engine: Engine, _: object) -> None:
        generator = torch.Generator().manual_seed(first + engine.state.iteration)
        labels = torch.randint(0, 2, (BATCH, 2), generator=generator, dtype=torch.int8)
        tokens = torch.randn(BATCH, 2, DIM, generator=generator)
        tokens[..., 0] += 2.0 * labels[:, :1] * informative
        labels[0] = -1
        engine.state.batch = {"labels": labels}
        engine.state.cls = (tokens * encoder).detach()

    engine = Engine(step)
    probe.attach(engine)
    engine.run([None] * steps, max_epochs=1, epoch_length=steps)
    return engine, encoder


def new_probe() -> OnlineProbe:
    return OnlineProbe(DIM, ["Emphysema", "Atelectasis"], log_every=20, lr=0.05, device=torch.device("cpu"))


def test_it_learns_what_the_tokens_know():
    knowing, _ = run(60, new_probe(), informative=True)
    ignorant, _ = run(60, new_probe(), informative=False)
    # one of two labels can be known at AUROC about .95, the other is noise
    assert knowing.state.metrics["online_probe_auroc"] > 0.65
    assert 0.4 < ignorant.state.metrics["online_probe_auroc"] < 0.6


def test_the_encoder_gets_no_gradient():
    _, encoder = run(3, new_probe(), informative=True)
    assert encoder.grad is None


def test_volumes_without_labels_teach_nothing():
    probe = new_probe()
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(
        Events.ITERATION_STARTED,
        lambda e: (
            setattr(e.state, "cls", torch.ones(4, 2, DIM)),
            e.state.__setattr__("batch", {"labels": torch.full((4, 2), -1, dtype=torch.int8)}),
        ),
    )
    probe.attach(engine)
    engine.run([None] * 20, max_epochs=1, epoch_length=20)
    assert "online_probe_auroc" not in engine.state.metrics
    assert all(torch.equal(tensor, torch.zeros_like(tensor)) for tensor in probe.probe.state_dict().values())


def test_a_probe_restored_from_its_state_goes_on_as_if_never_stopped():
    unbroken, first, second = new_probe(), new_probe(), new_probe()
    run(7, unbroken, informative=True)
    run(4, first, informative=True)
    second.load_state_dict(first.state_dict())
    run(3, second, informative=True, first=4)
    for name, tensor in unbroken.probe.state_dict().items():
        assert second.probe.state_dict()[name] == pytest.approx(tensor.numpy(), abs=0)
