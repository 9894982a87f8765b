"""The evaluation bundle as users run it, on random embeddings with planted labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigWorkflow

from common.cohort.cohort import load_labels
from common.embeddings.bags import BagReader
from common.engines.probe_grid import probe_scores
from common.networks.mil_probe import load_probe
from common.reports.results import read_predictions, read_rows

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "eval_ct_rate"
CLASSES = [label.name for label in load_labels("ct_rate")]
SCHEDULE = {"num_val_patients": 5, "max_steps": 30, "val_interval": 10, "checkpoint_every": 10}
SCHEDULE |= {"log_every": 10}


@pytest.fixture
def evaluation(sites: Path, workflow: Callable[..., ConfigWorkflow]) -> Callable[..., ConfigWorkflow]:
    def make(**knobs: Any) -> ConfigWorkflow:
        places = {"dataset_dir": sites / "ct_rate", "encoder_bundle": sites / "dale_ct_2s"}
        return workflow("eval_ct_rate", "train", **places, **SCHEDULE | knobs)

    return make


def test_evaluation_leaves_a_probe_pictures_and_rows(
    evaluation: Callable[..., ConfigWorkflow], tmp_path: Path
) -> None:
    run = evaluation()
    assert run.check_properties() == []
    bags = run.trainer.train_bags, run.trainer.val_bags, run.trainer.test_bags
    assert [len(cohort) for cohort in bags] == [50, 10, 20]
    patients = [{volume.rsplit("_", 2)[0] for volume in cohort.volumes} for cohort in bags]
    assert not patients[0] & patients[1]
    run.run()
    macro = run.trainer.state.reports["probe"]["macro"]
    assert macro["auroc"] > 0.65
    rows = {
        (row.encoder, row.metric): row
        for row in read_rows(tmp_path / "results.csv")
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
    (record,) = client.search_runs([client.get_experiment_by_name("eval_ct_rate").experiment_id])
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


def test_standardized_probes_from_the_prior_are_rows_of_their_own_and_predict_as_saved(
    evaluation: Callable[..., ConfigWorkflow], tmp_path: Path
) -> None:
    run = evaluation(standardize=True, prior_bias=True, poolers=["max", "learned_attention"])
    trainer, losses = run.trainer, []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    run.run()
    rows = read_rows(tmp_path / "results.csv")
    assert {row.protocol for row in rows if row.encoder == "dale_ct_2s"} == {
        "mil_probe_standardized_prior_bias",
        "mil_probe_standardized_prior_bias_seeds",
    }
    bags = trainer.train_bags
    tokens = np.concatenate([bags[index]["tokens"].numpy() for index in range(len(bags))]).astype(np.float64)
    probe, _ = load_probe(tmp_path / "out")
    np.testing.assert_allclose(probe.standardizer.mean, tokens.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(probe.standardizer.std, tokens.std(0), rtol=1e-5)
    scores = probe_scores(probe, BagReader(trainer.test_bags, torch.device("cpu")))
    written = read_predictions(tmp_path / "out" / "test_predictions.csv").probabilities
    np.testing.assert_array_equal(scores, written)
    first = bags.labels[trainer.batches.batch(0)].numpy().astype(np.float64)
    rates = bags.labels.double().mean(0).numpy()
    constant = -(first * np.log(rates) + (1 - first) * np.log(1 - rates)).mean()
    assert float(losses[0]) == pytest.approx(constant, rel=1e-5)


def test_checkpoint_of_other_data_is_refused(evaluation: Callable[..., ConfigWorkflow]) -> None:
    evaluation(max_steps=10).run()
    with pytest.raises(RuntimeError, match="Failed to evaluate") as failure:
        evaluation(max_steps=10, num_val_patients=6).run()
    assert isinstance(failure.value.__cause__, ValueError)
    assert "num_volumes [50, 10, 20], now [48, 12, 20]" in str(failure.value.__cause__)
    assert "data [" in str(failure.value.__cause__)


def test_command_line_runs_from_any_folder_with_a_file_of_overrides_and_resumes_after_ctrl_c(
    stop_and_resume: Callable, sites: Path, tmp_path: Path
) -> None:
    small = {"poolers": ["max"], "learning_rates": [0.1], "num_seeds": 2, "max_steps": 3000}
    (tmp_path / "small.json").write_text(json.dumps(SCHEDULE | small))
    words = [
        *("monai.bundle", "run"),
        *("--config_file", f"['{BUNDLE}/configs/train.json','{tmp_path}/small.json']"),
        *("--bundle_root", str(BUNDLE), "--dataset_dir", str(sites / "ct_rate")),
        *("--encoder_bundle", str(sites / "dale_ct_2s"), "--output_dir", str(tmp_path / "out")),
    ]
    checkpoints = tmp_path / "out" / "checkpoints"
    resumed = stop_and_resume(words, lambda said: list(checkpoints.glob("step_*.pt")), tmp_path / "out")
    assert "Resumed at step" in resumed
    assert "Done: results in" in resumed
    rows = read_rows(tmp_path / "results" / "eval_ct_rate.csv")
    assert len(rows) == 12
    assert {row.seeds for row in rows} == {"42", "", "42 43"}
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["pooler"] == "max"
    assert (tmp_path / "mlflow.db").is_file()
