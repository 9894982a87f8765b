"""The walk of the README on a tiny synthetic cohort: every command as users give it, from NIfTI to a row."""

import csv
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from common.embeddings.store import EmbeddingStore

REPOSITORY = Path(__file__).resolve().parents[1]
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
def walk(python_m, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walk")

    def python(*words) -> None:
        result = python_m(words, folder, PYTHONPATH=str(REPOSITORY))
        assert result.returncode == 0, f"{words}\n{result.stderr[-3000:]}"

    def bundle(root: Path, config: str, **knobs) -> None:
        words = [word for name, value in knobs.items() for word in (f"--{name}", value)]
        python(
            "monai.bundle", "run", "--config_file", root / "configs" / config, "--bundle_root", root, *words
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
