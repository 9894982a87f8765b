"""What pretraining engines share, with an engine whose loss is given."""

import json

import pytest
import torch
from ignite.engine import Events
from torch import nn

from common.engines.pretraining_trainer import PretrainingTrainer, means_over_ranks
from common.transforms.hounsfield import HU_WINDOWS
from tests.common.engines.conftest import step_loader


class GivenLosses(PretrainingTrainer):
    """Takes its losses from a list."""

    def __init__(self, losses: list[float], folder, **changes) -> None:
        self.losses, self.read = losses, []
        network = nn.Linear(2, 1)
        arguments = {
            "device": torch.device("cpu"),
            "max_epochs": 1,
            "max_steps": len(losses),
            "train_data_loader": step_loader(),
            "network": network,
            "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
            "loss_function": nn.Identity(),
            "hu_window": HU_WINDOWS["ct_rate"],
            "clip_norm": 3.0,
            "amp_dtype": "float32",
            "log_every": 1,
            "grad_norms_every": 0,
            "output_dir": folder,
        }
        super().__init__(**arguments | changes)

    def compute(self, batch):
        self.read.append(batch["position"].tolist())
        loss = self.network(torch.zeros(1, 2)).sum()
        loss.backward()
        return {"loss": loss * 0 + self.losses[self.state.iteration - 1]}, {"cls": loss[None]}

    def after_step(self):
        pass

    def measure(self, output):
        return {"measured": self.state.iteration}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize(("log_every", "looked_at"), [(1, 2), (2, 2), (3, 3), (5, 3)])
def test_a_loss_that_is_not_finite_stops_the_run_and_lists_its_batch(loss, log_every, looked_at, tmp_path):
    engine = GivenLosses([1.0, loss, float("nan")], tmp_path / "new", log_every=log_every)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step 2; .*Lower lr"):
        engine.run()
    assert engine.state.iteration == looked_at
    listed = json.loads((tmp_path / "new" / "not_finite_step_00000002_rank_0.json").read_text())
    volumes = [f"train_{position}" for position in range(5, 10)]
    assert listed == {"step": 2, "loss": str(loss), "volume": volumes, "position": [5, 6, 7, 8, 9]}


def test_finite_losses_let_the_run_go_on_and_are_looked_at_once(tmp_path):
    engine = GivenLosses([1.0, 2.0, 3.0], tmp_path, log_every=2)
    engine.run()
    assert engine.unchecked == []
    assert engine.state.metrics["measured"] == 2
    assert engine.state.output[0].keys() == {"loss", "grad_norm"}
    assert not engine.state.cls.requires_grad


def test_a_run_that_starts_at_a_later_step_reads_the_data_of_that_step(tmp_path):
    engine = GivenLosses([1.0] * 7, tmp_path)
    engine.add_event_handler(Events.STARTED, lambda e: setattr(e.state, "iteration", 4))
    engine.run()
    assert engine.read == [list(range(5 * step, 5 * step + 5)) for step in (4, 5, 6)]


def test_means_of_one_rank_are_the_values_without_gradient_in_float32():
    value = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    means = means_over_ranks({"loss": value * 2, "half": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert {name: float(mean) for name, mean in means.items()} == {"loss": 4.0, "half": 0.5}
    assert {mean.dtype for mean in means.values()} == {torch.float32}
    assert not means["loss"].requires_grad


@pytest.mark.parametrize(
    ("amp_dtype", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_the_precision_is_one_of_two(amp_dtype, expected, tmp_path):
    engine = GivenLosses([1.0], tmp_path, amp_dtype=amp_dtype)
    with engine.autocast():
        assert engine.network(torch.zeros(1, 2)).dtype == expected
    with pytest.raises(ValueError, match="amp_dtype.* got 'float16'"):
        GivenLosses([1.0], tmp_path, amp_dtype="float16")


def test_gradients_are_measured_in_steps_that_are_recorded(tmp_path):
    for every in (3, -2):
        with pytest.raises(ValueError, match=rf"grad_norms_every .* 2, got {every}\."):
            GivenLosses([1.0], tmp_path, log_every=2, grad_norms_every=every)
