"""The pictures are looked at by people; here it is tested that they show what they are given."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib.figure import Figure

from common.cohort.predictions import Predictions
from common.handlers import probe_pictures
from common.handlers.probe_pictures import (
    draw_attention,
    draw_per_class,
    draw_precision_recall,
    draw_reliability,
    draw_roc,
    read_slices,
    volumes_to_show,
)
from common.metrics.bootstrap import bootstrap, interval_report, resample_weights
from common.metrics.multilabel import multilabel_report

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

    monkeypatch.setattr(probe_pictures.Figure, "savefig", remember)
    return figures


def test_roc_panels_hold_the_curve_the_threshold_and_the_area(drawn: list[Figure], tmp_path: Path) -> None:
    draw_roc(tmp_path / "roc.png", predictions(), intervals()["per_class"], "title")
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
    draw_precision_recall(tmp_path / "pr.png", predictions(), intervals()["per_class"], "title")
    for axes in drawn[0].axes[:2]:
        recall, precision = axes.lines[0].get_xydata().T
        area = (np.diff(recall) * precision[1:]).sum()
        assert f"AUPRC {area:.3f} (" in axes.get_title()
        assert axes.lines[-1].get_xydata()[0].tolist() in np.c_[recall, precision].tolist()


def test_reliability_panels_hold_ten_bins_in_order(drawn: list[Figure], tmp_path: Path) -> None:
    draw_reliability(tmp_path / "reliability.png", predictions(), "title")
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


def test_volumes_to_show_are_the_surest_true_positives() -> None:
    p = predictions()
    chosen = volumes_to_show(p)
    for volume, name in chosen.items():
        row, column = p.volumes.index(volume), CLASSES.index(name)
        assert p.labels[row, column] == 1
        assert p.probabilities[row, column] == p.probabilities[p.labels[:, column] == 1, column].max()
    assert "Pleural effusion" not in chosen.values()
    assert len(volumes_to_show(p, most=1)) == 1
    assert volumes_to_show(p._replace(thresholds=np.full(3, 2.0))) == {}


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


def test_slices_are_read_feet_to_head(tmp_path: Path) -> None:
    # stored head to feet: the affine's z runs downwards
    hu = np.arange(5, dtype=np.int16)[None, None].repeat(3, 0).repeat(4, 1) - 1000
    affine = np.diag([1.0, 1.0, -2.0, 1.0])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(hu, affine), tmp_path / "deep" / "er" / "valid_1_a_1.NII")
    read = read_slices(tmp_path, ["valid_1_a_1"])["valid_1_a_1"]
    assert read.shape == (5, 4, 4)
    assert read[:, 0, 1].tolist() == [-996, -997, -998, -999, -1000]


def test_missing_ct_is_refused(tmp_path: Path) -> None:
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.diag([2, 2, 2, 1])), tmp_path / "a.nii"
    )
    with pytest.raises(FileNotFoundError, match="No CT of 'valid_1_a_1' in"):
        read_slices(tmp_path, ["valid_1_a_1"])
