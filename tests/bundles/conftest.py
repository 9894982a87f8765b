"""What the tests of bundle runs share: little shards, and commands as users type them."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from common.shards.writer import VolumeSlices, write_shard

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"


@pytest.fixture(scope="session")
def noise_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven little volumes of noise with masks, two of them ReX-annotated."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)

    def volume(index: int, rex: bool) -> VolumeSlices:
        slices = 6 + index
        return VolumeSlices(
            volume=f"train_{index}_a_1",
            ct=rng.integers(-1000, 1000, (slices, 40, 48)).astype(np.int16),
            ts=rng.integers(0, 118, (slices, 128, 128)).astype(np.uint8),
            rex=(rng.random((slices, 128, 128)) < 0.01).astype(np.uint16) * 5 if rex else None,
            spacing_mm=(0.8, 0.8, 3.0),
            original_shape=(48, 40, slices),
            original_axcodes="LPS",
            labels={"Lung nodule": index % 2},
            split="train",
        )

    write_shard(folder / "train-000000.tar", [volume(index, rex=False) for index in range(5)])
    write_shard(folder / "train-rex-000000.tar", [volume(index, rex=True) for index in range(5, 7)])
    return folder


class TrainingRuns:
    """Runs of a bundle's train.json, each in an output folder of its own.

    Args:
        python_m_on: runs ``python -m`` on some ranks.
        bundle: name of the bundle.
        shards: to train on.
        knobs: that make the run small.
    """

    def __init__(self, python_m_on: Callable, bundle: str, shards: Path, knobs: dict[str, Any]) -> None:
        self.python_m_on = python_m_on
        self.bundle = BUNDLES / bundle
        self.shards = shards
        self.knobs = knobs

    def command(self, out: Path, **knobs: Any) -> list[str]:
        paths = {"bundle_root": self.bundle, "dataset_dir": self.shards, "output_dir": out}
        paths |= {"run_name": out.name, "encoder_weights": out / "model.safetensors"}
        paths |= {"tracking_uri": f"sqlite:///{out.parent}/mlflow.db"}
        pairs = {**paths, **self.knobs, **knobs}
        words = [word for name, value in pairs.items() for word in (f"--{name}", str(value))]
        config = str(self.bundle / "configs" / "train.json")
        return ["monai.bundle", "run", "--config_file", config, *words]

    def start(self, out: Path, ranks: int = 1, **knobs: Any) -> subprocess.Popen:
        """Start a run from another folder than the repository's: the bundle finds its code by itself."""
        launcher = () if ranks == 1 else ("-m", *torchrun(ranks))
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", *self.command(out, **knobs)],
            cwd=out.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start_and_wait_for_a_checkpoint(self, out: Path, ranks: int = 1, **knobs: Any) -> subprocess.Popen:
        """Start a run and return as soon as it has saved its state."""
        process = self.start(out, ranks, **knobs)
        deadline = time.monotonic() + 180
        while not list(out.glob("checkpoints/step_*.pt")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()[-3000:]
            time.sleep(0.005)
        return process

    def result(self, out: Path, ranks: int = 1, **knobs: Any) -> tuple[int, str]:
        """Run to the end; return its exit status and what it said."""
        result = self.python_m_on(ranks, self.command(out, **knobs), out.parent)
        return result.returncode, result.stderr

    def run(self, out: Path, ranks: int = 1, **knobs: Any) -> str:
        """Run to the end, which must be a good one; return what it said."""
        status, said = self.result(out, ranks, **knobs)
        assert status == 0, said[-3000:]
        return said

    def record(self, out: Path) -> tuple[MlflowClient, Run]:
        """Return the MLflow run of an output folder."""
        client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
        experiment = client.get_experiment_by_name("pretraining")
        runs = client.search_runs([experiment.experiment_id])
        return client, next(run for run in runs if run.info.run_name == out.name)

    def curve(self, out: Path, term: str) -> list[float]:
        """Return the recorded values of a term."""
        client, run = self.record(out)
        return [metric.value for metric in client.get_metric_history(run.info.run_id, term)]


@pytest.fixture(scope="session")
def training_runs(python_m_on: Callable, noise_shards: Path) -> Callable[[str, dict[str, Any]], TrainingRuns]:
    """Return ``runs(bundle, knobs) -> TrainingRuns``."""
    return lambda bundle, knobs: TrainingRuns(python_m_on, bundle, noise_shards, knobs)


@pytest.fixture(scope="session")
def python_m_on(python_m: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """Return ``run(ranks, words, cwd)``: ``python_m``, under torchrun where the ranks are several.

    They are forks as well, which torchrun can do by itself, and import nothing anew.
    """

    def run(ranks: int, words: list[str], cwd: Path) -> subprocess.CompletedProcess:
        if ranks == 1:
            return python_m(words, cwd)
        program = importlib.util.find_spec(f"{words[0]}.__main__").origin
        forks = ("--run-path", "--start-method=fork")
        return python_m([*torchrun(ranks), *forks, program, *words[1:]], cwd)

    return run


def torchrun(ranks: int) -> tuple[str, ...]:
    """Return the module and words of torchrun, with a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--master_addr=127.0.0.1", f"--master_port={port}")
    return ("torch.distributed.run", f"--nproc_per_node={ranks}", *where)
