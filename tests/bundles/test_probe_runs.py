"""The evaluation bundle as users run it, on random embeddings with planted labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigWorkflow

from common.cohort.cohort import load_labels
from common.embeddings.store import IDENTITY_KEYS, EmbeddingStoreWriter
from common.networks.mil_probe import load_probe
from common.reports.results import read_rows

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "eval_ct_rate"
CLASSES = [label.name for label in load_labels("ct_rate")]
SCHEDULE = {
    "num_val_patients": 5,
    "max_steps": 30,
    "val_interval": 10,
    "checkpoint_every": 10,
    "log_every": 10,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings and labels in the places where CT-RATE and an encoder bundle have them."""
    root = tmp_path_factory.mktemp("cohort")
    labels_dir = root / "ct_rate" / "dataset" / "multi_abnormality_labels"
    labels_dir.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, num_volumes in (("train", 40), ("valid", 20)):
        rows = [",".join(["VolumeName", *CLASSES])]
        folder = root / "dale_ct_2s" / "embeddings" / split
        identity = dict.fromkeys(IDENTITY_KEYS, "x") | {"encoder": "dale_ct_2s", "token_kind": "slice"}
        with EmbeddingStoreWriter(folder, identity, "float16") as writer:
            for index in range(num_volumes):
                volume = f"{split}_{index // 2 + 1}_a_{index % 2 + 1}"
                labels = (rng.random(len(CLASSES)) < 0.4).astype(int)
                cls = rng.standard_normal((int(rng.integers(3, 9)), 23))
                cls[:, : len(CLASSES)] += 2 * labels
                writer.add(volume, torch.from_numpy(cls), (1, 1, 1), z_mm=torch.arange(len(cls)))
                rows.append(",".join([f"{volume}.nii.gz", *map(str, labels)]))
        (labels_dir / f"{split}_predicted_labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def workflow(cohort: Path, tmp_path: Path) -> Callable[..., ConfigWorkflow]:
    def make(**knobs: Any) -> ConfigWorkflow:
        paths = {
            "bundle_root": BUNDLE,
            "dataset_dir": cohort / "ct_rate",
            "encoder_bundle": cohort / "dale_ct_2s",
            "output_dir": tmp_path / "out",
            "results_csv": tmp_path / "results" / "eval_ct_rate.csv",
        }
        settings = {name: str(path) for name, path in paths.items()} | SCHEDULE
        settings["tracking_uri"] = f"sqlite:///{tmp_path}/mlflow.db"
        config = BUNDLE / "configs" / "train.json"
        return ConfigWorkflow(str(config), workflow_type="train", **settings | knobs)

    return make


def test_bundle_fulfils_monais_contract_and_validates_on_a_draw_of_patients(
    workflow: Callable[..., ConfigWorkflow],
) -> None:
    evaluation = workflow()
    evaluation.initialize()
    assert evaluation.check_properties() == []
    bags = evaluation.trainer.train_bags, evaluation.trainer.val_bags, evaluation.trainer.test_bags
    assert [len(cohort) for cohort in bags] == [30, 10, 20]
    patients = [{volume.rsplit("_", 2)[0] for volume in cohort.volumes} for cohort in bags]
    assert not patients[0] & patients[1]


def test_evaluation_leaves_a_probe_pictures_and_rows(
    workflow: Callable[..., ConfigWorkflow], tmp_path: Path
) -> None:
    evaluation = workflow()
    evaluation.initialize()
    evaluation.run()
    macro = evaluation.trainer.state.reports["probe"]["macro"]
    assert macro["auroc"] > 0.8
    rows = {
        (row.encoder, row.metric): row
        for row in read_rows(tmp_path / "results" / "eval_ct_rate.csv")
        if row.protocol == "mil_probe"
    }
    assert rows["dale_ct_2s", "macro_auroc"].value == pytest.approx(macro["auroc"], abs=1e-6)
    assert rows["prevalence", "macro_auroc"].value == 0.5
    assert rows["dale_ct_2s", "macro_f1"].dataset == "ct_rate"
    assert rows["dale_ct_2s", "macro_f1"].n == 20
    row = rows["dale_ct_2s", "macro_auroc"]
    assert row.low <= row.value <= row.high
    _, card = load_probe(tmp_path / "out")
    assert card["class_names"] == CLASSES
    assert card["encoder"] == "dale_ct_2s"

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "eval_ct_rate"]
    (record,) = client.search_runs([experiment.experiment_id])
    assert record.info.run_name == "eval_ct_rate/out"
    assert record.info.status == "FINISHED"
    assert record.data.metrics["test_macro_auroc"] == pytest.approx(macro["auroc"])
    of_probes = [name for name in record.data.metrics if name.startswith("val_macro_auprc/")]
    assert len(of_probes) == 20
    files = {file.path for file in client.list_artifacts(record.info.run_id)}
    tables = {"per_class", "thresholds", "seeds", "attention", "test_predictions", "validation_predictions"}
    pictures = {"per_class", "roc", "precision_recall", "reliability", "attention"}
    expected = {f"{name}.csv" for name in tables} | {f"{name}.png" for name in pictures}
    assert {"probe.json", "probe.safetensors", *expected} <= files


def test_checkpoint_of_other_data_is_refused(workflow: Callable[..., ConfigWorkflow]) -> None:
    first = workflow(max_steps=10)
    first.initialize()
    first.run()
    second = workflow(max_steps=10, num_val_patients=6)
    second.initialize()
    with pytest.raises(RuntimeError, match="Failed to evaluate") as failure:
        second.run()
    assert isinstance(failure.value.__cause__, ValueError)
    assert "num_volumes [30, 10, 20], now [28, 12, 20]" in str(failure.value.__cause__)
    assert "data [" in str(failure.value.__cause__)


def test_class_names_of_the_metadata_are_those_of_the_label_set() -> None:
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    assert list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values()) == CLASSES


def test_command_line_runs_from_any_folder_with_a_file_of_overrides(
    python_m: Callable, cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.json").write_text(
        json.dumps(SCHEDULE | {"poolers": ["max"], "learning_rates": [0.1], "num_seeds": 2})
    )
    words = [
        *("monai.bundle", "run"),
        *("--config_file", f"['{BUNDLE}/configs/train.json','{tmp_path}/small.json']"),
        *("--bundle_root", str(BUNDLE), "--dataset_dir", str(cohort / "ct_rate")),
        *("--encoder_bundle", str(cohort / "dale_ct_2s"), "--output_dir", str(tmp_path / "out")),
    ]
    answer = python_m(words, tmp_path)
    assert answer.returncode == 0, answer.stderr
    rows = read_rows(tmp_path / "results" / "eval_ct_rate.csv")
    assert len(rows) == 12
    assert {row.seeds for row in rows} == {"42", "", "42 43"}
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["pooler"] == "max"
    assert (tmp_path / "mlflow.db").is_file()
