"""The walk of the README on a tiny synthetic cohort, from NIfTI to a row, and the modules on its path."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from common.embeddings.store import EmbeddingStore

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_MODULES = 26
"""Modules of ``common`` that may run between a volume and its row, and between a slab and its loss."""

# Runs first in every command of the walk, and notes the files of common whose functions are called.
PROFILE = """
import atexit, inspect, os, sys, threading

called = set()


def note(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:
        called.add(code.co_filename)


def write():
    sys.setprofile(None)
    with open(os.environ["HOPS"], "a") as file:
        file.writelines(f"{path}\\n" for path in called if path.startswith(os.environ["HOPS_OF"]))


if "HOPS" in os.environ:
    atexit.register(write)
    threading.setprofile(note)
    sys.setprofile(note)
"""

ENCODER, PROBE = (REPOSITORY / "bundles" / name for name in ("dale_ct_2s", "eval_ct_rate"))
TINY = {
    **{
        "img_size_px": 32,
        "patch_size_px": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "layer_scale_init": 0.1,
    },
    **{"amp_dtype": "float32", "num_workers": 0},
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(PROFILE, encoding="utf-8")

    def python(*words, hops: str = "other") -> None:
        paths = f"{site}:{REPOSITORY}"
        words = [str(word) for word in words]
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "HOPS": str(folder / hops),
            "HOPS_OF": f"{REPOSITORY}/common/",
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{words}\n{result.stderr[-3000:]}"

    def bundle(hops: str, root: Path, config: str, **knobs) -> None:
        words = [word for name, value in knobs.items() for word in (f"--{name}", value)]
        python(
            "monai.bundle",
            "run",
            "--config_file",
            root / "configs" / config,
            "--bundle_root",
            root,
            *words,
            hops=hops,
        )

    python(
        *("data_prep", "phantom", "--volumes", 40, "--out", "cohort", "--seed", 3, "--matrix", 48),
        *("--spacing", 10, 12, "--valid-share", 0.3, "--processes", 1),
    )
    python(
        *("data_prep", "ct-rate", "--root", "cohort", "--split", "train", "--out", "shards"),
        *("--rexgroundingct", "cohort/rexgroundingct/dataset.json"),
        *("--rexgroundingct-masks", "cohort/rexgroundingct/segmentations"),
    )
    bundle(
        "slab_to_loss",
        ENCODER,
        "train.json",
        dataset_dir="shards",
        output_dir="run",
        encoder_weights="run/model.safetensors",
        global_size_px=32,
        local_size_px=16,
        num_local=3,
        projector_hidden_dim=16,
        projection_dim=11,
        num_directions=32,
        batch_size=4,
        max_steps=4,
        warmup_steps=1,
        log_every=1,
        **TINY,
    )
    for split in ("train", "valid"):
        bundle(
            "volume_to_table",
            ENCODER,
            "inference.json",
            dataset_dir=f"cohort/dataset/{split}_fixed",
            split=split,
            strategies="['cropped_32']",
            output_dir=f"embeddings/{split}",
            encoder_weights="run/model.safetensors",
            **TINY,
        )
    bundle(
        "volume_to_table",
        PROBE,
        "train.json",
        dataset_dir="cohort",
        embeddings_dir="embeddings",
        output_dir="probe",
        results_csv="results/eval_ct_rate.csv",
        num_val_patients=5,
        max_steps=20,
        val_interval=10,
        log_every=10,
        checkpoint_every=10,
    )
    return folder


@pytest.mark.slow
def test_a_volume_becomes_a_row_of_the_table(walk):
    with (walk / "results" / "eval_ct_rate.csv").open() as file:
        rows = {(row["encoder"], row["metric"]): row for row in csv.DictReader(file)}
    ours = rows["dale_ct_2s", "macro_auroc"]
    assert 0 <= float(ours["value"]) <= 1
    assert ours["dataset"] == "ct_rate"
    num_volumes = len(list((walk / "cohort" / "dataset" / "valid_fixed").rglob("*.nii.gz")))
    assert int(ours["n"]) == num_volumes
    assert float(rows["prevalence", "macro_auroc"]["value"]) == 0.5
    assert len(EmbeddingStore(walk / "embeddings" / "valid")) == num_volumes


@pytest.mark.slow
def test_the_walk_is_recorded_in_the_default_store(walk):
    client = MlflowClient(f"sqlite:///{walk}/mlflow.db")
    finished = {
        experiment.name: [run.info.status for run in client.search_runs([experiment.experiment_id])]
        for experiment in client.search_experiments()
    }
    assert finished["pretraining"] == ["FINISHED"]
    assert finished["eval_ct_rate"] == ["FINISHED"]


@pytest.mark.slow
def test_the_pictures_of_the_walk_are_there(walk):
    for picture in ("run/views.png", "probe/per_class.png"):
        assert (walk / picture).stat().st_size > 10_000


def modules_on(path: Path) -> set[str]:
    return {line.removeprefix(f"{REPOSITORY}/") for line in path.read_text().splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["volume_to_table", "slab_to_loss"])
def test_a_reader_can_hold_the_path_in_their_head(walk, path, capsys):
    modules = sorted(modules_on(walk / path))
    with capsys.disabled():
        sys.stdout.write(
            "\n    ".join([f"\n{len(modules)} modules from {path.replace('_', ' ')}:", *modules]) + "\n"
        )
    assert len(modules) <= MAX_MODULES


@pytest.mark.slow
def test_the_hops_of_the_readme_run(walk):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Follow one volume\n(.*?)^## ", readme, re.M | re.S).group(1)
    shown = set(re.findall(r"\]\((common/[^)]+\.py)\)", section))
    assert shown
    assert shown <= modules_on(walk / "volume_to_table") | modules_on(walk / "slab_to_loss")
