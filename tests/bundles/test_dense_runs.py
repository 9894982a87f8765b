"""The dense and the geometric evaluation as users run them, on random tokens with planted labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigWorkflow
from scipy.sparse import csr_matrix

from common.embeddings.dense_labels import DenseLabels, write_dense_labels
from common.embeddings.store import EmbeddingStoreWriter
from common.networks.dense_probe import load_dense_probe
from common.reports.results import read_rows

SCHEDULE = {"max_steps": 40, "val_interval": 20, "checkpoint_every": 20, "log_every": 20}
Make = Callable[..., ConfigWorkflow]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of two encoders, the first of which knows an organ and a finding, and their labels."""
    root = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    shown = {}
    for number in range(20):
        shares = np.zeros((20 * 4, 118), np.float32)
        shares[:, 51] = 0.5 * (rng.random(80) < 0.3)
        shares[:, 0] = 1 - shares.sum(1)
        findings = (rng.random((20, 4)) < 0.3).astype(np.uint16)
        volume = f"valid_{number + 1}_a_1"
        shown[volume] = shares[:, 51].reshape(20, 4), findings
        write_dense_labels(root / "labels", DenseLabels(volume, (0, 0, 8), csr_matrix(shares), findings))
    for encoder, signal in (("slab", 4.0), ("flat", 0.0)):
        identity = {"encoder": encoder, "encoder_id": "sha256:0", "preprocessing": "cropped_256"}
        identity |= {"slice_order": "feet_to_head", "token_kind": "slice"}
        with EmbeddingStoreWriter(root / encoder, identity, "float16") as writer:
            for volume, (heart, findings) in shown.items():
                patches = rng.standard_normal((20, 4, 8))
                patches[..., 0] += signal * heart
                patches[..., 1] += signal * findings
                cls = patches.mean(1)
                cls[:, 2] += signal * np.linspace(0, 1, 20)
                writer.add(
                    *(volume, torch.from_numpy(cls), (0.7, 0.7, 5.0)),
                    **{"z_mm": torch.arange(20) * 5.0, "patches": torch.from_numpy(patches)},
                    **{"patch_grid": [2, 2], "box": [0, 0, 8], "side_px": 8},
                )
    return root


@pytest.fixture
def dense(workflow: Make, cohort: Path) -> Make:
    places = {"embeddings_dir": cohort / "slab", "labels_dir": cohort / "labels", "num_resamples": 50}
    return lambda **knobs: workflow("eval_dense_2d", "train", **places | SCHEDULE | knobs)


def run_in_mlflow(tmp_path: Path, experiment: str) -> tuple[Any, set[str]]:
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (record,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return record, {file.path for file in client.list_artifacts(record.info.run_id)}


def test_table_i_in_one_command(dense: Make, tmp_path: Path) -> None:
    evaluation = dense(learning_rates=[3.0, 0.1])
    assert evaluation.check_properties() == []
    trainer = evaluation.trainer
    cohorts = trainer.drawn.cohort, trainer.val_cohort, trainer.test_cohort  # patients, split in three
    assert [len(cohort.volumes) for cohort in cohorts] == [14, 2, 4]
    evaluation.run()
    rows = {(row.protocol, row.dataset, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    assert len(rows) == 8
    found = rows["dense_patch", "rexgroundingct", "macro_auroc"]
    assert found.value > 0.9
    assert found.low < found.value < found.high
    assert found.n == 4
    _, card = load_dense_probe(tmp_path / "out", "patch", "totalsegmentator")
    assert card["encoder"] == "slab"
    record, files = run_in_mlflow(tmp_path, "eval_dense_2d")
    assert record.info.status == "FINISHED"
    assert record.data.metrics["test_macro_auroc/patch/rexgroundingct"] == pytest.approx(
        found.value, abs=1e-6
    )
    assert {"patch_rexgroundingct.png", "cls_totalsegmentator.csv", "executed_config.json"} <= files


def test_standardized_dense_probes_from_the_prior_are_rows_of_their_own(dense: Make, tmp_path: Path) -> None:
    evaluation = dense(standardize=True, prior_bias=True, learning_rates=[0.3])
    trainer, losses = evaluation.trainer, []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output[0]["loss"]))
    evaluation.run()
    protocols = {row.protocol for row in read_rows(tmp_path / "results.csv")}
    assert protocols == {f"dense_{kind}_standardized_prior_bias" for kind in ("cls", "patch")}
    assert trainer.state.reports["patch", "rexgroundingct"]["macro"]["auroc"][0] > 0.9
    targets = torch.cat([trainer.drawn[step]["targets"].double() for step in range(40)], dim=1)
    rates = targets.mean(1).clamp(1e-5, 1 - 1e-5)[:, None]
    first = trainer.drawn[0]["targets"].double()
    of_classes = -(first * rates.log() + (1 - first) * (1 - rates).log()).mean(1)
    constant = torch.stack([of_classes[:, :14].mean(1), of_classes[:, 14:].mean(1)]).mean()
    assert float(losses[0]) == pytest.approx(float(constant), rel=1e-4)


def test_dense_checkpoint_of_other_patients_is_refused(dense: Make) -> None:
    dense(max_steps=20).run()
    with pytest.raises(RuntimeError, match="Failed to evaluate") as failure:
        dense(max_steps=20, split_percent=[60, 20, 20]).run()
    assert "num_volumes [14, 2, 4], now [12, 4, 4]" in str(failure.value.__cause__)


def test_table_v_in_one_command(workflow: Make, cohort: Path, tmp_path: Path) -> None:
    places = {"slab_embeddings_dir": cohort / "slab", "flat_embeddings_dir": cohort / "flat"}
    places["dense_labels_dir"] = cohort / "labels"
    knobs = {"gaps_mm": [10, 20], "split_percent": [50, 20, 30], "num_resamples": 50}
    workflow("eval_slab_depth", "evaluate", **places, **knobs).run()
    rows = {(row.encoder, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    assert rows["slab", "z_position_r2_mm"].value > 0.8
    assert rows["flat", "z_position_r2_mm"].value < 0.3
    assert rows["slab - flat", "continuity_geodesic"].low > 0
    assert ("slab", "organ_span_iou/heart") in rows
    assert (tmp_path / "out" / "table_v.csv").read_text().startswith("metric,slab,flat\nMacro AUROC,not run")
    record, files = run_in_mlflow(tmp_path, "eval_slab_depth")
    assert record.info.status == "FINISHED"
    assert record.data.metrics["slab/z_position_r2_mm"] == pytest.approx(
        rows["slab", "z_position_r2_mm"].value, rel=1e-5
    )
    assert {"figure_2.png", "world_model.png", "comparisons.csv"} <= files
