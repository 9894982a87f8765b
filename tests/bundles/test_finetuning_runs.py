"""Fine-tuning as users run it, on little CTs whose labels show in their brightness."""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.cohort.cohort import load_labels
from common.embeddings.encoder_bundle import open_encoder_bundle
from common.engines.predict import predict
from common.networks.encoder import save_encoder
from common.reports.results import read_predictions, read_rows
from tests.bundles.conftest import BUNDLES, TrainingRuns

NAMES = [label.name for label in load_labels("ct_rate")]
ENCODER = {
    **{"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    **{"strategies": ["raw_32"], "amp_dtype": "float32", "compiled": False},
}
KNOBS = {
    **{"encoder_bundle": BUNDLES / "dale_ct_2s", "encoder_knobs": ENCODER, "num_val_patients": 4},
    **{"batch_size": 3, "max_steps": 6, "warmup_steps": 1, "val_interval": 3, "num_resamples": 50},
    **{"slices_per_chunk": 3, "amp_dtype": "float32", "num_workers": 0, "checkpoint_every": 2},
    **{"encoder_lr": 1e-2, "probe_lr": 1e-2},
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen CTs to train on and six to test on, with labels, as CT-RATE lays them out."""
    root, rng = tmp_path_factory.mktemp("ct_rate") / "dataset", np.random.default_rng(0)
    (root / "multi_abnormality_labels").mkdir(parents=True)
    for split, num_volumes in (("train", 14), ("valid", 6)):
        rows = []
        for number in range(1, num_volumes + 1):
            volume, labels = f"{split}_{number}_a_1", (rng.random(18) < 0.5).astype(int)
            hu = rng.integers(-900, 100, (32, 32, int(rng.integers(4, 9))))
            hu[:16] += 300 * labels[0]
            path = root / f"{split}_fixed" / f"{volume}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(hu.astype(np.int16), np.diag([-0.8, -0.8, 2.0, 1.0])), path)
            rows.append([f"{volume}.nii.gz", *labels])
        with (root / "multi_abnormality_labels" / f"{split}_predicted_labels.csv").open("w") as file:
            csv.writer(file).writerows([["VolumeName", *NAMES], *rows])
    return root.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the little encoder, as training would leave them."""
    path = tmp_path_factory.mktemp("weights") / "base.safetensors"
    bundle = open_encoder_bundle(BUNDLES / "dale_ct_2s", (), ENCODER | {"encoder_weights": None})
    save_encoder(bundle.network.state_dict(), path, bundle["identity"])
    return path


@pytest.fixture(scope="module")
def runs(python_m_on, cohort, weights) -> TrainingRuns:
    return TrainingRuns(
        python_m_on, "finetune_ct_rate", cohort, {**KNOBS, "encoder_knobs": json.dumps(ENCODER)}
    )


def finetune(workflow: Any, cohort: Path, out: Path, weights: Path | None, **knobs: Any) -> Path:
    encoder = ENCODER | {"encoder_weights": None if weights is None else str(weights)}
    shown = KNOBS | {"dataset_dir": cohort, "output_dir": out, "encoder_knobs": encoder}
    run = workflow("finetune_ct_rate", "train", **(shown | {"results_csv": out / "results.csv"} | knobs))
    run.run()
    run.finalize()
    return out


def test_the_frozen_mode_trains_the_probe_of_the_grid(workflow, cohort, weights, tmp_path) -> None:
    knobs = {"mode": "probe", "probe_lr": 0.1, "warmup_steps": 0, "clip_norm": None}
    tuned = finetune(workflow, cohort, tmp_path / "tuned", weights, **knobs)
    stores = {}
    for split in ("train", "valid"):
        bundle = open_encoder_bundle(
            BUNDLES / "dale_ct_2s",
            (),
            ENCODER
            | {"dataset_dir": str(cohort / "dataset" / f"{split}_fixed"), "encoder_weights": str(weights)}
            | {"output_dir": str(tmp_path / split), "embedding_dtype": "float32", "num_workers": 0},
        )
        _ = bundle["run"]
        stores[split] = tmp_path / split
    grid = {"poolers": ["learned_attention"], "learning_rates": [0.1], "num_seeds": 1}
    same = {name: KNOBS[name] for name in ("num_val_patients", "batch_size", "max_steps", "val_interval")}
    run = workflow(
        "eval_ct_rate",
        "train",
        **(grid | same | {"dataset_dir": cohort, "num_resamples": 50, "output_dir": tmp_path / "grid"}),
        train_embeddings_dir=stores["train"],
        test_embeddings_dir=stores["valid"],
    )
    run.run()
    expected, found = (read_predictions(p / "test_predictions.csv") for p in (tmp_path / "grid", tuned))
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(found.thresholds, expected.thresholds, atol=1e-5)
    ours, theirs = (load_file(folder / "probe.safetensors") for folder in (tuned, tmp_path / "grid"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("mode", "given", "left"),
    [
        ("lora", True, "adapter"),
        ("lora", False, "model"),
        ("last_blocks", True, "model"),
        ("full", True, "model"),
    ],
)
def test_what_it_leaves_predicts_as_it_did(mode, given, left, workflow, cohort, weights, tmp_path) -> None:
    base = weights if given else None
    knobs = {"mode": mode, "num_blocks": 1}
    if mode == "full":
        frozen = finetune(workflow, cohort, tmp_path / "frozen", base, mode="probe")
        knobs |= {"frozen_probe": frozen}
    out = finetune(workflow, cohort, tmp_path / "out", base, **knobs)
    assert [path.name for path in out.glob("*.safetensors")].count(f"{left}.safetensors") == 1
    predicted = predict(
        BUNDLES / "dale_ct_2s",
        out,
        cohort / "dataset" / "valid_fixed",
        tmp_path / "predictions",
        encoder_knobs=ENCODER
        | {"encoder_weights": str(out / f"{left}.safetensors"), "num_workers": 0}
        | {"embedding_dtype": "float32"},
        num_pages=0,
        force=True,
    )
    tested = read_predictions(out / "test_predictions.csv")
    found = [[row["probability"] for row in predicted[volume]] for volume in tested.volumes]
    np.testing.assert_allclose(found, tested.probabilities, atol=1e-5)
    protocols = {row.protocol for row in read_rows(out / "results.csv")}
    assert protocols == {f"finetune_{mode}"} | ({f"finetune_{mode}-frozen"} if mode == "full" else set())
    assert (out / "per_class.png").stat().st_size > 10_000
    sizes = {path.stem: path.stat().st_size for path in out.glob("*.safetensors")}
    assert left == "model" or sizes["adapter"] < weights.stat().st_size / 2


@pytest.mark.two_ranks
def test_ranks_and_kills_change_nothing(runs, weights, tmp_path) -> None:
    encoder = {"encoder_knobs": json.dumps(ENCODER | {"encoder_weights": str(weights)})}
    runs.run(tmp_path / "unbroken", **encoder)
    process = runs.start_and_wait_for_a_checkpoint(tmp_path / "killed", **encoder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "Resumed at step" in runs.run(tmp_path / "killed", **encoder)
    expected = load_file(tmp_path / "unbroken" / "adapter.safetensors")
    for name, weight in load_file(tmp_path / "killed" / "adapter.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)
    scores = read_predictions(tmp_path / "unbroken" / "test_predictions.csv").probabilities
    for sharding in ("ddp", "fsdp2"):
        out = tmp_path / sharding
        runs.run(out, 2, sharding=sharding, **encoder)
        np.testing.assert_allclose(
            read_predictions(out / "test_predictions.csv").probabilities, scores, atol=1e-5
        )


def test_ct_and_labels_that_do_not_fit_are_refused(workflow, cohort, tmp_path) -> None:
    with pytest.raises(RuntimeError) as refused:
        finetune(workflow, cohort, tmp_path / "out", None, encoder_bundle=BUNDLES / "ct_fm", encoder_knobs={})
    assert "ct_fm" in str(refused.value.__cause__ or refused.value)
