"""The pictures are looked at by people; here it is tested that they show what they are given."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score

from common.cohort.cohort import write_table
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report
from common.reports.probe_pictures import (
    METRICS,
    class_rows,
    draw_attention,
    draw_classes,
    draw_per_class,
    seed_rows,
    threshold_rows,
)
from common.reports.results import Predictions

CLASSES = ["Emphysema", "Lung nodule", "Pleural effusion"]
N = 40


def predictions() -> Predictions:
    """The last class never occurs."""
    rng = np.random.default_rng(0)
    labels = (rng.random((N, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    scores = (0.5 * labels + 0.5 * rng.random((N, 3))).round(1)
    volumes = [f"valid_{index}_a_1" for index in range(N)]
    return Predictions("dale_ct_2s", volumes, CLASSES, scores, np.array([0.6, 0.4, 0.5]), labels)


def intervals() -> dict:
    p = predictions()
    samples = bootstrap(p.probabilities, p.labels, p.thresholds, resample_weights(p.volumes, 50, 0))
    return interval_report(samples, CLASSES)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *arguments: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_roc_panels_hold_the_curve_the_threshold_and_the_area(drawn: list[Figure], tmp_path: Path) -> None:
    draw_classes(tmp_path / "roc.png", "roc", predictions(), intervals()["per_class"], "title")
    assert (tmp_path / "roc.png").stat().st_size > 1000
    panels, p = drawn[0].axes, predictions()
    for index, axes in enumerate(panels[:2]):
        curve, _, dot = axes.lines
        called, positive = p.probabilities[:, index] >= p.thresholds[index], p.labels[:, index] == 1
        assert dot.get_xydata().tolist() == [[called[~positive].mean(), called[positive].mean()]]
        assert dot.get_xydata()[0].tolist() in curve.get_xydata().tolist()
        x, y = curve.get_xydata().T
        assert f"AUROC {np.trapezoid(y, x):.3f} (" in axes.get_title()
    assert panels[2].texts[0].get_text() == "undefined"
    assert "0 of 40" in panels[2].get_title()


def test_precision_recall_panels_hold_the_steps_under_which_the_area_lies(
    drawn: list[Figure], tmp_path: Path
) -> None:
    draw_classes(tmp_path / "a.png", "precision_recall", predictions(), intervals()["per_class"], "title")
    for axes in drawn[0].axes[:2]:
        recall, precision = axes.lines[0].get_xydata().T
        area = (np.diff(recall) * precision[1:]).sum()
        assert f"AUPRC {area:.3f} (" in axes.get_title()
        assert axes.lines[-1].get_xydata()[0].tolist() in np.c_[recall, precision].tolist()


def test_reliability_panels_hold_ten_bins_in_order(drawn: list[Figure], tmp_path: Path) -> None:
    draw_classes(tmp_path / "a.png", "reliability", predictions(), intervals()["per_class"], "title")
    bins = drawn[0].axes[0].lines[1].get_xydata()
    assert bins.shape == (10, 2)
    assert (np.diff(bins[:, 0]) >= 0).all()
    assert bins[:, 1].mean() == pytest.approx(predictions().labels[:, 0].mean())
    assert drawn[0].axes[0].get_title().startswith("Emphysema\nECE 0.")


def test_bars_have_the_length_of_the_metric_and_name_the_undefined(
    drawn: list[Figure], tmp_path: Path
) -> None:
    p = predictions()
    report = multilabel_report(p.probabilities, p.labels, p.thresholds, CLASSES)
    reports, both = {"probe": report, "prevalence": report}, {"probe": intervals()}
    draw_per_class(tmp_path / "per_class.png", reports, both, "title")
    axes = drawn[0].axes[0]
    widths = [bar.get_width() for bar in axes.containers[0]]
    expected = [report["per_class"][name]["auroc"] for name in CLASSES]
    np.testing.assert_array_equal(widths, expected)
    assert [text.get_text() for text in axes.texts].count("undefined") == 2


def test_attention_is_drawn_relative_to_the_mean_with_the_heaviest_slices(
    drawn: list[Figure], tmp_path: Path
) -> None:
    weights = {"a": np.array([0.1, 0.2, 0.05, 0.4, 0.25]), "b": np.full(7, 1 / 7)}
    slices = {volume: np.zeros((len(weight), 3, 4)) for volume, weight in weights.items()}
    slices["a"][3] = 50.0
    draw_attention(tmp_path / "attention.png", weights, {"a": "first", "b": "second"}, slices, "slice")
    axes = drawn[0].axes
    assert [bar.get_height() for bar in axes[0].containers[0]] == pytest.approx([0.5, 1.0, 0.25, 2.0, 1.25])
    assert [picture.get_title() for picture in axes[1:5]] == [
        f"slice {index}: {weight:.2f}" for index, weight in ((3, 2.0), (4, 1.25), (1, 1.0), (0, 0.5))
    ]
    assert axes[1].images[0].get_array().max() == 50.0
    draw_attention(tmp_path / "attention.png", weights, {"a": "first", "b": "second"}, {}, "token")
    assert len(drawn[1].axes) == 2
    assert [figure.get_supxlabel() for figure in drawn] == ["slice, feet to head", "token, as stored"]


def predictions_of_probe_tables(num_volumes: int, seed: int) -> Predictions:
    """The last class never occurs."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_volumes, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    volumes = [f"valid_{index}_a_1" for index in range(num_volumes)]
    scores, thresholds = rng.random((num_volumes, 3)), np.array([0.6, 0.3, 0.5])
    return Predictions("dale_ct_2s", volumes, CLASSES, scores, thresholds, labels)


def test_class_rows_hold_metrics_intervals_calibration_and_counts() -> None:
    p = predictions_of_probe_tables(31, seed=0)
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
    cohorts = {
        "validation": predictions_of_probe_tables(23, seed=1),
        "test": predictions_of_probe_tables(31, seed=2),
    }
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
