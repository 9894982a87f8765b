"""A killed run goes on where it stopped and ends as an unbroken one."""

import os
import signal

import pytest
import torch
from ignite.engine import Engine, Events
from safetensors import safe_open
from torch import nn

from common.handlers.checkpoint import Checkpoint, SaveEncoder
from common.run.process import Stopped


class Killed(Exception):
    pass


def checkpoint(folder, network, optimizer=None, **options) -> Checkpoint:
    own = {"others": {}, "interval_steps": 1, "keep": 1, "knobs": {}} | options
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1)
    return Checkpoint(folder=folder, network=network, optimizer=optimizer, **own)


def run(
    folder,
    steps: int,
    kill_at: int | None = None,
    knobs=None,
    keep: int = 2,
    signal_at: int | None = None,
    numbers: tuple[int, ...] = (signal.SIGTERM,),
    ended: dict | None = None,
):
    """Train a little network on data that is a function of the step, as our engines do."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    seen = []

    def step(engine, _):
        seen.append(engine.state.iteration)
        if engine.state.iteration == kill_at:
            raise Killed
        if engine.state.iteration == signal_at:
            for number in numbers:
                os.kill(os.getpid(), number)
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(engine.state.iteration))
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
        scheduler.step()

    engine = Engine(step)
    checkpoint(
        *(folder, network, optimizer),
        others={"scheduler": scheduler},
        interval_steps=3,
        keep=keep,
        knobs={"seed": 1} if knobs is None else knobs,
    ).attach(engine)
    engine.state.epoch_length = steps
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        engine.run(range(steps), max_epochs=1, epoch_length=steps)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended is not None:
        ended.update(vars(engine.state))
    return network.state_dict(), optimizer.state_dict(), seen


def test_a_run_killed_between_checkpoints_ends_in_the_same_weights(tmp_path):
    unbroken, optimizer, _ = run(tmp_path / "a", steps=11)
    with pytest.raises(Killed):
        run(tmp_path / "b", steps=11, kill_at=8)
    resumed, optimizer_resumed, seen = run(tmp_path / "b", steps=11)
    assert seen == [7, 8, 9, 10, 11]
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)
    for index, state in optimizer["state"].items():
        assert torch.equal(state["exp_avg_sq"], optimizer_resumed["state"][index]["exp_avg_sq"])


def test_a_checkpoint_is_saved_after_every_other_handler_of_its_step(tmp_path):
    network = nn.Linear(2, 3)
    engine = Engine(lambda engine, batch: None)
    checkpoint(tmp_path, network, keep=9).attach(engine)
    found = []

    def count_files(_):
        found.append(len(list(tmp_path.iterdir())))

    engine.add_event_handler(Events.ITERATION_COMPLETED, count_files)
    engine.run(range(3))
    assert found == [0, 1, 2]


def test_a_finished_run_does_nothing_when_run_again(tmp_path):
    run(tmp_path, steps=6)
    assert run(tmp_path, steps=6)[2] == []


def test_only_the_newest_checkpoints_are_kept_and_half_written_ones_go(tmp_path):
    (tmp_path / "step_00000003.pt.partial").write_bytes(b"half")
    run(tmp_path, steps=11, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000009.pt", "step_00000011.pt"]


def test_other_knobs_are_refused_and_named(tmp_path):
    run(tmp_path, steps=3, knobs={"seed": 1, "lr": 0.1})
    with pytest.raises(ValueError, match=r"seed 1, now 2\. .*--output_dir"):
        run(tmp_path, steps=3, knobs={"seed": 2, "lr": 0.1})


def test_a_further_network_and_its_buffers_come_back(tmp_path):
    def run_with_teacher(steps: int) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Linear(2, 3)
        teacher = nn.BatchNorm1d(3).requires_grad_(False)
        optimizer = torch.optim.AdamW(network.parameters())

        def step(engine, _):
            network(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            teacher.weight += engine.state.iteration
            teacher.running_mean += 1

        engine = Engine(step)
        checkpoint(tmp_path, network, optimizer, others={"teacher": teacher}, interval_steps=2).attach(engine)
        engine.run(range(steps), max_epochs=1, epoch_length=steps)
        return teacher

    run_with_teacher(2)
    resumed = run_with_teacher(3)
    assert resumed.weight.tolist() == [1.0 + 1 + 2 + 3] * 3
    assert resumed.running_mean.tolist() == [3.0] * 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    network = nn.Linear(2, 3)
    with torch.no_grad():
        network.bias[1] = float("nan")
    engine = Engine(lambda engine, batch: None)
    checkpoint(tmp_path, network).attach(engine)
    with pytest.raises(FloatingPointError, match=r"\['bias'\].*1\.pt'"):
        engine.run(range(2))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run_before_its_weights_are_saved(tmp_path):
    network = nn.Linear(2, 3)

    def look() -> None:
        raise FloatingPointError("nan at step 2")

    engine = Engine(lambda engine, _: None)
    engine.stop_if_not_finite = look
    checkpoint(tmp_path, network, interval_steps=2).attach(engine)
    with pytest.raises(FloatingPointError, match="nan at step 2"):
        engine.run(range(3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_is_as_sigterm_and_the_run_knows_its_exit_status(tmp_path, number, status, capfd):
    unbroken, _, _ = run(tmp_path / "a", steps=7)
    ended: dict = {}
    run(tmp_path / "b", steps=7, signal_at=4, numbers=(number,), ended=ended)
    assert (ended["iteration"], ended["exit_status"]) == (4, status)
    assert (tmp_path / "b" / "step_00000004.pt").is_file()
    assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1
    resumed, _, seen = run(tmp_path / "b", steps=7)
    assert seen == [5, 6, 7]
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, steps=7, signal_at=4, numbers=(signal.SIGINT, signal.SIGINT))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.pt"]


def test_ctrl_c_after_the_last_step_ends_what_handlers_do_then(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    engine = Engine(lambda engine, batch: None)
    network = nn.Linear(1, 1)
    checkpoint(tmp_path, network, interval_steps=9).attach(engine)
    engine.add_event_handler(Events.COMPLETED, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(Stopped):
            engine.run([0, 0], max_epochs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002.pt"]


def save_at_the_end(path, stop: bool) -> None:
    def step(engine, _):
        if stop:
            engine.state.exit_status = 143
            engine.terminate()

    engine = Engine(step)
    SaveEncoder(nn.Linear(2, 3), path, {"name": "tiny"}).attach(engine)
    engine.run([0, 0], max_epochs=1, epoch_length=2)


def test_a_completed_run_leaves_its_weights_and_their_identity(tmp_path):
    save_at_the_end(tmp_path / "model.safetensors", stop=False)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["identity"] == '{"name": "tiny", "steps": 2}'
        assert set(file.keys()) == {"weight", "bias"}


def test_an_interrupted_run_leaves_none(tmp_path):
    save_at_the_end(tmp_path / "model.safetensors", stop=True)
    assert not (tmp_path / "model.safetensors").exists()
