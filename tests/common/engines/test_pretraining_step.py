"""What pretraining engines share; that they use it is tested with each of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events

from common.engines.pretraining_step import (
    autocast_as,
    check_amp_dtype,
    keep_to_the_step,
    means_over_ranks,
    on_device,
    remember_step,
    stop_if_not_finite,
)


def engine_after(losses: list[float], folder) -> SimpleNamespace:
    """An engine whose last step was the seventh."""
    state = SimpleNamespace(iteration=7 - len(losses))
    engine = SimpleNamespace(output_dir=folder, unchecked=[], state=state)
    for loss in losses:
        engine.state.iteration += 1
        position = torch.tensor([2, 3]) + engine.state.iteration
        remember_step(engine, torch.tensor(loss), {"volume": ["a", "b"], "position": position, "masks": None})
    return engine


def test_finite_losses_let_the_run_go_on_and_are_looked_at_once(tmp_path):
    engine = engine_after([1.0, 2.0], tmp_path)
    stop_if_not_finite(engine)
    assert engine.unchecked == []
    stop_if_not_finite(engine)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_the_first_other_one_ends_it_and_names_its_slabs(loss, tmp_path):
    with pytest.raises(FloatingPointError, match=r"got (nan|inf) at step 6"):
        stop_if_not_finite(engine_after([1.0, loss, float("nan")], tmp_path / "new"))
    listed = json.loads((tmp_path / "new" / "not_finite_step_00000006_rank_0.json").read_text())
    assert listed == {"step": 6, "loss": str(loss), "volume": ["a", "b"], "position": [8, 9]}


def test_data_start_where_a_checkpoint_left_the_run_and_the_last_loss_counts(tmp_path):
    sampler = SimpleNamespace(start_step=0)
    engine = Engine(lambda engine, batch: None)
    engine.data_loader = SimpleNamespace(batch_sampler=sampler)
    engine.output_dir, engine.unchecked = tmp_path, []
    engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "iteration", 3))
    keep_to_the_step(engine)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(event_filter=lambda engine, step: step == 5),
        lambda engine: engine.unchecked.extend(engine_after([float("nan")], tmp_path).unchecked),
    )
    with pytest.raises(FloatingPointError):
        engine.run(range(5), max_epochs=1, epoch_length=5)
    assert sampler.start_step == 3


def test_means_of_one_rank_are_the_values_without_gradient_in_float32():
    value = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    means = means_over_ranks({"loss": value * 2, "half": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert {name: float(mean) for name, mean in means.items()} == {"loss": 4.0, "half": 0.5}
    assert {mean.dtype for mean in means.values()} == {torch.float32}
    assert not means["loss"].requires_grad


def test_only_what_is_named_goes_to_the_device():
    given = {"pixels": torch.zeros(2), "labels": torch.zeros(3), "volume": ["a"], "num_global": 2}
    batch = on_device(given, ["pixels", "planes"], torch.device("meta"))
    assert batch.keys() == given.keys()
    assert batch["pixels"].device.type == "meta"
    assert all(batch[name] is given[name] for name in ("labels", "volume", "num_global"))


def test_the_precision_is_one_of_two():
    check_amp_dtype("float32")
    with pytest.raises(ValueError, match="amp_dtype must be 'bfloat16' or 'float32', got 'float16'"):
        check_amp_dtype("float16")
    layer = torch.nn.Linear(2, 2)
    for amp_dtype, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with autocast_as(amp_dtype, torch.device("cpu")):
            assert layer(torch.zeros(1, 2)).dtype == expected
