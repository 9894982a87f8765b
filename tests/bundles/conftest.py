"""What the tests of bundle runs share: little shards, and commands as users type them."""

import csv
import importlib.util
import json
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
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from common.cohort.class_map import class_map
from common.cohort.cohort import load_labels
from common.embeddings.store import EmbeddingStoreWriter

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
TINY = {
    **{"global_size_px": 32, "local_size_px": 16, "num_local": 3, "img_size_px": 32, "patch_size_px": 8},
    **{"embed_dim": 24, "depth": 1, "num_heads": 2, "layer_scale_init": 0.1, "projector_hidden_dim": 16},
    **{"projection_dim": 11, "num_directions": 32, "batch_size": 4, "max_steps": 9, "warmup_steps": 2},
    **{"amp_dtype": "float32", "num_workers": 0, "log_every": 1, "checkpoint_every": 2},
}
"""Knobs of LeJEPA's bundles that take seconds."""


def assert_same_weights(found: Path, expected: Path, rtol: float = 0, atol: float = 0) -> None:
    """Compare the encoders that two runs left in their folders, by default bit by bit."""
    weights = load_file(found / "model.safetensors")
    for name, tensor in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=rtol, atol=atol, msg=name)


def embed_labels(
    folder: Path, labels: dict[str, np.ndarray], names: list[str], labels_csv: Path, shown: dict | None = None
) -> None:
    """Write a store whose dimension c is raised in all slices of a volume with label c, and its labels.

    Args:
        folder: folder of the store.
        labels: volume to the labels that its embedding shows.
        names: columns of the CSV.
        labels_csv: CSV to write.
        shown: volume to its cells, where they are others.
    """
    rng = np.random.default_rng(len(labels))
    identity = {"encoder": "dale_ct_2s", "encoder_id": "x", "preprocessing": "cropped_256"}
    identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
    with EmbeddingStoreWriter(folder, identity, "float16") as writer:
        for volume, positive in labels.items():
            tokens = rng.standard_normal((int(rng.integers(3, 9)), 23))
            tokens[:, : len(positive)] += 2 * positive
            writer.add(
                volume, torch.from_numpy(tokens), (0.8, 0.8, 2.0), z_mm=2.0 * torch.arange(len(tokens))
            )
    labels_csv.parent.mkdir(parents=True, exist_ok=True)
    rows = [["VolumeName", *names], *([volume, *cells] for volume, cells in (shown or labels).items())]
    with labels_csv.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="session")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both sites, embedded by one encoder, where the bundles look for them."""
    root, rng = tmp_path_factory.mktemp("sites"), np.random.default_rng(0)
    ct_rate, rad = ([label.name for label in load_labels(name)] for name in ("ct_rate", "rad_chestct"))
    folder = root / "ct_rate" / "dataset" / "multi_abnormality_labels"
    embeddings = root / "dale_ct_2s" / "embeddings"
    for split, num_volumes in (("train", 60), ("valid", 20)):
        names = [f"{split}_{index // 2 + 1}_a_{index % 2 + 1}" for index in range(num_volumes)]
        labels = {name: (rng.random(18) < 0.4).astype(int) for name in names}
        embed_labels(embeddings / split, labels, ct_rate, folder / f"{split}_predicted_labels.csv")
    names = [f"trn{n:05d}" for n in range(40)] + [f"val{n:05d}" for n in range(12)]
    labels = {
        name: (rng.random(18) < 0.4).astype(int) for name in [*names, *(f"tst{n:05d}" for n in range(24))]
    }
    shown = {name: [int(y[places].max()) for places in class_map(ct_rate, rad)] for name, y in labels.items()}
    embed_labels(embeddings / "rad_chestct", labels, rad, root / "rad" / "rad_chestct_labels.csv", shown)
    return root


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
        config = self.bundle / "configs" / "train.json"
        known = json.loads(config.read_text())
        pairs = {**{name: path for name, path in paths.items() if name in known}, **self.knobs, **knobs}
        words = [word for name, value in pairs.items() for word in (f"--{name}", str(value))]
        return ["monai.bundle", "run", "--config_file", str(config), *words]

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
        deadline = time.monotonic() + 300
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
