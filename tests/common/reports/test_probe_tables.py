import csv
import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score

from common.cohort.predictions import Predictions
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report
from common.reports.probe_tables import METRICS, class_rows, seed_rows, threshold_rows, write_table

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]


def predictions(num_volumes: int, seed: int) -> Predictions:
    """The last class never occurs."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_volumes, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    volumes = [f"valid_{index}_a_1" for index in range(num_volumes)]
    scores, thresholds = rng.random((num_volumes, 3)), np.array([0.6, 0.3, 0.5])
    return Predictions("dale_ct_2s", volumes, CLASSES, scores, thresholds, labels)


def test_class_rows_hold_metrics_intervals_calibration_and_counts() -> None:
    p = predictions(31, seed=0)
    report = multilabel_report(p.probabilities, p.labels, p.thresholds, CLASSES)
    floor = multilabel_report(np.zeros((31, 3)), p.labels, np.zeros(3), CLASSES)
    weights = resample_weights(p.volumes, 40, seed=0)
    intervals = interval_report(bootstrap(p.probabilities, p.labels, p.thresholds, weights), CLASSES)
    rows = class_rows({"probe": report, "prevalence": floor}, {"probe": intervals}, p)
    assert [row["class"] for row in rows] == CLASSES
    for index, row in enumerate(rows[:2]):
        for metric in METRICS:
            assert float(row[metric]) == pytest.approx(report["per_class"][row["class"]][metric], abs=1e-6)
            ends = (float(row[f"{metric}_low"]), float(row[f"{metric}_high"]))
            assert ends == pytest.approx(intervals["per_class"][row["class"]][metric], abs=1e-6)
            assert ends[0] <= float(row[metric]) <= ends[1]
        brier = brier_score_loss(p.labels[:, index], p.probabilities[:, index])
        assert float(row["brier"]) == pytest.approx(brier, abs=1e-6)
        assert float(row["auprc_of_prevalence"]) == pytest.approx(p.labels[:, index].mean(), abs=1e-6)
        assert (row["positives"], row["volumes"]) == (int(p.labels[:, index].sum()), 31)
    assert rows[2]["auroc"] == rows[2]["auroc_low"] == rows[2]["f1"] == "nan"


def test_threshold_rows_hold_what_the_confusion_matrix_says_on_both_cohorts() -> None:
    cohorts = {"validation": predictions(23, seed=1), "test": predictions(31, seed=2)}
    rows = threshold_rows(**cohorts)
    for index, row in enumerate(rows[:2]):
        assert float(row["threshold"]) == cohorts["test"].thresholds[index]
        for cohort, p in cohorts.items():
            y, called = p.labels[:, index], p.probabilities[:, index] >= p.thresholds[index]
            (tn, fp), (fn, tp) = confusion_matrix(y, called)
            expected = {
                "f1": f1_score(y, called),
                "sensitivity": tp / (tp + fn),
                "specificity": tn / (tn + fp),
                "positive_predictive_value": tp / (tp + fp),
                "negative_predictive_value": tn / (tn + fn),
                "positives": tp + fn,
                "called": tp + fp,
            }
            for name, value in expected.items():
                assert float(row[f"{cohort}_{name}"]) == pytest.approx(value, abs=1e-6), name
    assert math.isnan(float(rows[2]["test_sensitivity"]))
    assert rows[2]["test_positives"] == "0"


def test_seed_rows_name_every_seed() -> None:
    reports = [{"macro": dict.fromkeys(METRICS, value)} for value in (0.5, 0.25)]
    rows = seed_rows([42, 43], reports)
    assert rows[1] == {"seed": 43, **{f"macro_{metric}": "0.250000" for metric in METRICS}}
    assert [row["seed"] for row in rows] == [42, 43]


def test_table_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"a": 1, "b": "x, y"}, {"a": 2, "b": ""}])
    write_table(tmp_path / "t.csv", [{"a": 3, "b": "x, y"}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "3", "b": "x, y"}]
