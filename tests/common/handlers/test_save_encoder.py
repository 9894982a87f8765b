"""The encoder is exported when training is done, not when it is interrupted."""

import torch
from ignite.engine import Engine
from safetensors import safe_open

from common.handlers.save_encoder import SaveEncoder


def run(path, stop: bool) -> None:
    def step(engine, _):
        if stop:
            engine.state.stopped_early = True
            engine.terminate()

    engine = Engine(step)
    SaveEncoder(torch.nn.Linear(2, 3), path, {"name": "tiny"}).attach(engine)
    engine.run([0, 0], max_epochs=1, epoch_length=2)


def test_a_completed_run_leaves_its_weights_and_their_identity(tmp_path):
    run(tmp_path / "model.safetensors", stop=False)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["identity"] == '{"name": "tiny", "steps": 2}'
        assert set(file.keys()) == {"weight", "bias"}


def test_an_interrupted_run_leaves_none(tmp_path):
    run(tmp_path / "model.safetensors", stop=True)
    assert not (tmp_path / "model.safetensors").exists()
