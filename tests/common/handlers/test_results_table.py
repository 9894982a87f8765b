from collections.abc import Sequence
from pathlib import Path

import pytest
from ignite.engine import Engine

from common.handlers.results_table import ResultsTable
from common.metrics.multilabel import multilabel_report
from common.reports.results_csv import read_rows


class Bags:
    """Three test volumes, of which only the origin matters here."""

    def __init__(self, encoder: str) -> None:
        self.identity = {"encoder": encoder}

    def __len__(self) -> int:
        return 3


def evaluation(encoder: str = "dale_ct_2s", further_seeds: Sequence[int] = ()) -> Engine:
    """An engine that has trained and tested a probe."""
    engine = Engine(lambda engine, batch: None)
    report = multilabel_report(
        [[0.1, 0.2], [0.8, 0.3], [0.3, 0.1]], [[0, 0], [1, 0], [1, 0]], [0.5, 0.5], ["A", "B"]
    )
    floor = multilabel_report([[0.0, 0.0]] * 3, [[0, 0], [1, 0], [1, 0]], [0.0, 0.0], ["A", "B"])
    engine.state.reports = {"probe": report, "prevalence": floor}
    engine.state.intervals = {
        subject: {"macro": dict.fromkeys(report["macro"], (0.25, 0.75))}
        for subject in ("probe", "prevalence")
    }
    engine.state.seed_reports = [report, floor, floor] if further_seeds else [report]
    engine.further_seeds = list(further_seeds)
    engine.test_bags = Bags(encoder)
    return engine


def run(engine: Engine, path: Path) -> None:
    ResultsTable(path=path, protocol="mil_probe", dataset="ct_rate", seed=42, config={"lr": 0.1}).attach(
        engine
    )
    engine.run([0], max_epochs=1)


def test_evaluation_adds_four_rows_for_the_encoder_and_four_for_the_floor(tmp_path: Path) -> None:
    run(evaluation(), tmp_path / "results" / "eval_ct_rate.csv")
    rows = read_rows(tmp_path / "results" / "eval_ct_rate.csv")
    values = {(row.encoder, row.metric): row.value for row in rows}
    assert values == pytest.approx(
        {
            ("dale_ct_2s", "macro_auroc"): 1.0,
            ("dale_ct_2s", "macro_auprc"): 1.0,
            ("dale_ct_2s", "macro_f1"): 2 / 3,
            ("dale_ct_2s", "macro_balanced_accuracy"): 0.75,
            ("prevalence", "macro_auroc"): 0.5,
            ("prevalence", "macro_auprc"): 2 / 3,
            ("prevalence", "macro_f1"): 0.8,
            ("prevalence", "macro_balanced_accuracy"): 0.5,
        },
        abs=1e-6,
    )
    assert {row.n for row in rows} == {3}
    assert {(row.low, row.high) for row in rows} == {(0.25, 0.75)}
    assert {(row.encoder, row.seeds) for row in rows} == {("dale_ct_2s", "42"), ("prevalence", "")}
    assert len({row.config_hash for row in rows}) == 1


def test_further_seeds_add_four_rows_of_their_mean_and_range(tmp_path: Path) -> None:
    run(evaluation(further_seeds=(43, 44)), tmp_path / "r.csv")
    rows = {row.metric: row for row in read_rows(tmp_path / "r.csv") if row.protocol == "mil_probe_seeds"}
    assert len(rows) == 4
    auroc = rows["macro_auroc"]  # 1 with one seed and .5 with two
    assert auroc.numbers == pytest.approx((2 / 3, 0.5, 1.0), abs=1e-6)
    assert (auroc.encoder, auroc.seeds, auroc.n) == ("dale_ct_2s", "42 43 44", 3)


def test_second_encoder_joins_and_a_second_run_replaces(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    run(evaluation(), path)
    run(evaluation("random"), path)
    first = read_rows(path)
    assert len(first) == 12
    run(evaluation("random"), path)
    assert read_rows(path) == first


def test_run_that_was_asked_to_stop_adds_nothing(tmp_path: Path) -> None:
    engine = evaluation()
    engine.state.stopped_early = True
    run(engine, tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()
