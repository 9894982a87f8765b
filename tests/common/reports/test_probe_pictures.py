"""The pictures are looked at by people; here it is tested that they show what they are given."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, confusion_matrix, f1_score

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
from tests.common.conftest import CLASSES, predictions


def reports(p: Predictions) -> tuple[dict, dict]:
    """Reports and intervals of a probe and of the prevalence."""
    scored = {"probe": p.probabilities, "prevalence": np.zeros(p.labels.shape)}
    weights = resample_weights(p.volumes, 50, 0)
    return (
        {who: multilabel_report(s, p.labels, p.thresholds, CLASSES) for who, s in scored.items()},
        {
            who: interval_report(bootstrap(s, p.labels, p.thresholds, weights), CLASSES)
            for who, s in scored.items()
        },
    )


def drawn_classes(kind: str, path: Path) -> None:
    intervals = reports(predictions())[1]["probe"]["per_class"]
    draw_classes(path, kind=kind, predictions=predictions(), intervals=intervals, title="title")


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
    drawn_classes("roc", tmp_path / "roc.png")
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
    drawn_classes("precision_recall", tmp_path / "a.png")
    for axes in drawn[0].axes[:2]:
        recall, precision = axes.lines[0].get_xydata().T
        area = (np.diff(recall) * precision[1:]).sum()
        assert f"AUPRC {area:.3f} (" in axes.get_title()
        assert axes.lines[-1].get_xydata()[0].tolist() in np.c_[recall, precision].tolist()


def proportion_ci(positives: int, count: int) -> tuple[float, float]:
    """Wilson's interval: the shares whose distance from the observed one is 1.96 of their standard errors."""
    shares, z = np.linspace(0, 1, 200_001), norm.ppf(0.975)
    inside = np.abs(positives / count - shares) <= z * np.sqrt(shares * (1 - shares) / count) + 1e-9
    return tuple(shares[inside][[0, -1]])


def test_reliability_panels_hold_ten_bins_in_order(drawn: list[Figure], tmp_path: Path) -> None:
    drawn_classes("reliability", tmp_path / "a.png")
    bins = drawn[0].axes[0].lines[1].get_xydata()
    assert bins.shape == (10, 2)
    assert (np.diff(bins[:, 0]) >= 0).all()
    assert bins[:, 1].mean() == pytest.approx(predictions().labels[:, 0].mean())
    assert drawn[0].axes[0].get_title().startswith("Emphysema\nECE 0.")
    ends = [line[:, 1] for line in drawn[0].axes[0].collections[0].get_segments()]
    for (low, high), share in zip(ends, bins[:, 1], strict=True):  # four volumes per bin
        expected = proportion_ci(round(4 * share), 4)
        assert (low, high) == pytest.approx(expected, abs=1e-4)


def test_bars_have_the_length_of_the_metric_and_name_the_undefined(
    drawn: list[Figure], tmp_path: Path
) -> None:
    found, intervals = reports(predictions())
    draw_per_class(tmp_path / "per_class.png", found, intervals, "title")
    axes = drawn[0].axes[0]
    widths = [bar.get_width() for bar in axes.containers[0]]
    expected = [found["probe"]["per_class"][name]["auroc"] for name in CLASSES]
    np.testing.assert_array_equal(widths, expected)
    assert [text.get_text() for text in axes.texts].count("undefined") == 2


def test_attention_is_drawn_relative_to_the_mean_with_the_heaviest_slices(
    drawn: list[Figure], tmp_path: Path
) -> None:
    weights = {"a": np.array([0.1, 0.2, 0.05, 0.4, 0.25]), "b": np.full(7, 1 / 7)}
    slices = {volume: np.zeros((len(weight), 3, 4)) for volume, weight in weights.items()}
    slices["a"][3] = 50.0
    shown = {"weights": weights, "captions": {"a": "first", "b": "second"}}
    draw_attention(tmp_path / "attention.png", **shown, slices=slices, unit="slice")
    axes = drawn[0].axes
    assert [bar.get_height() for bar in axes[0].containers[0]] == pytest.approx([0.5, 1.0, 0.25, 2.0, 1.25])
    assert [picture.get_title() for picture in axes[1:5]] == [
        f"slice {index}: {weight:.2f}" for index, weight in ((3, 2.0), (4, 1.25), (1, 1.0), (0, 0.5))
    ]
    assert axes[1].images[0].get_array().max() == 50.0
    draw_attention(tmp_path / "attention.png", **shown, slices={}, unit="token")
    assert len(drawn[1].axes) == 2
    assert [figure.get_supxlabel() for figure in drawn] == ["slice, feet to head", "token, as stored"]


def test_class_rows_hold_metrics_intervals_calibration_and_counts() -> None:
    p = predictions(31)
    found, intervals = reports(p)
    rows = class_rows(found, intervals, p)
    assert [row["class"] for row in rows] == CLASSES
    for index, row in enumerate(rows[:2]):
        for metric in METRICS:
            value, ends = (of["probe"]["per_class"][row["class"]][metric] for of in (found, intervals))
            assert float(row[metric]) == pytest.approx(value, abs=1e-6)
            written = (float(row[f"{metric}_low"]), float(row[f"{metric}_high"]))
            assert written == pytest.approx(ends, abs=1e-6)
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
