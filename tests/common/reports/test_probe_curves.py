"""The pictures are looked at by people; here it is tested that they show what they are given."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from common.cohort.predictions import Predictions
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report
from common.reports.probe_curves import draw_attention, draw_classes, draw_per_class

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
