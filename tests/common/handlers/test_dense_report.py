import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common.engines.dense_probe import DenseProbeTrainer
from common.handlers.dense_report import DenseReport, draw_classes
from common.networks.dense_probe import load_dense_probe
from common.reports.paired_differences import dense_differences
from common.reports.results import read_rows


@pytest.fixture
def trainer(build_dense: Any, dense_cohorts: Any, tmp_path: Path) -> DenseProbeTrainer:
    paths = {"output_dir": tmp_path / "out", "results_csv": tmp_path / "results.csv"}
    return build_dense(
        dense_cohorts, 6, handlers=[DenseReport(**paths, suffix="", seed=7, settings={"seed": 7})]
    )


def test_probes_classes_and_rows_are_written(trainer: DenseProbeTrainer, tmp_path: Path) -> None:
    trainer.run()
    difference = dense_differences(tmp_path / "out", [tmp_path / "out"])
    assert [row["difference"] for row in difference] == [0.0] * 8
    rows = {(r.protocol, r.dataset, r.metric): r for r in read_rows(tmp_path / "results.csv")}
    assert len(rows) == 8
    for (kind, task), report in trainer.state.reports.items():
        layer, card = load_dense_probe(tmp_path / "out", kind, task)
        assert torch.equal(layer.weight, trainer.best.layer((kind, task)).weight)
        assert (card["encoder"], card["seed"], card["kind"]) == ("dale_ct_2s", 7, kind)
        row = rows[f"dense_{kind}", task, "macro_auprc"]
        mean, (low, high) = report["macro"]["auprc"]
        assert row.numbers == pytest.approx((mean, low, high), abs=1e-6)
        assert row.n == 7
        with (tmp_path / "out" / f"{kind}_{task}.csv").open(newline="") as file:
            classes = {line["class"]: line for line in csv.DictReader(file)}
        assert list(classes) == card["class_names"]
        left_out = {name for name, line in classes.items() if line["averaged"] == "0"}
        assert left_out == set(card["left_out"]) == set(report["left_out"])
        assert Image.open(tmp_path / "out" / f"{kind}_{task}.png").width > 500


def test_a_run_that_was_stopped_writes_nothing(trainer: DenseProbeTrainer, tmp_path: Path) -> None:
    trainer.state.exit_status = 143
    trainer.run()
    assert not (tmp_path / "results.csv").exists()


def test_a_picture_of_no_class_is_empty_but_there(tmp_path: Path) -> None:
    nothing = float("nan")
    report = {
        "per_class": {"heart": {"auroc": nothing, "auprc": nothing, "positives": 0, "prevalence": 0.0}},
        "macro": {"auroc": (nothing, (nothing, nothing))},
        "left_out": ["heart"],
    }
    draw_classes(tmp_path / "a.png", report, "title")
    assert (tmp_path / "a.png").stat().st_size > 1000
