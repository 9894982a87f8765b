"""Metrics against scikit-learn, class by class, and against brute force."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from common.metrics.multilabel import (
    auroc,
    average_precision,
    balanced_accuracy,
    expected_calibration_error,
    f1,
    f1_thresholds,
    macro,
    multilabel_report,
    reliability,
)

# P probes, N samples, C classes: all different
P, N, C = 3, 101, 7
THRESHOLDS = np.array([0.1, 0.4, 0.5, 0.5, 0.8, -1.0, 2.0])
RANKINGS = [auroc, average_precision, f1_thresholds]
DECISIONS = [f1, balanced_accuracy]
DECIMALS = [16, 2, 1, 0]  # of the scores: from no ties to nearly nothing but ties


def cohort(decimals: int = 16, probes: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    targets = (rng.random((N, C)) < np.linspace(0.05, 0.9, C)).astype(int)
    scores = rng.random((*probes, N, C)) * 0.8 + 0.2 * targets
    return scores.round(decimals), targets


def by_class(metric: Callable, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.array([metric(targets[:, label], scores[:, label]) for label in range(targets.shape[1])])


def measured(metric: Callable, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    thresholds = np.broadcast_to(THRESHOLDS, (*scores.shape[:-2], C))
    return metric(scores, targets, *((thresholds,) if metric in DECISIONS else ()))


@pytest.mark.parametrize("decimals", DECIMALS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (auroc, sklearn_metrics.roc_auc_score),
        (average_precision, sklearn_metrics.average_precision_score),
        (f1, lambda y, s: sklearn_metrics.f1_score(y, s, zero_division=0)),
        (balanced_accuracy, sklearn_metrics.balanced_accuracy_score),
    ],
)
def test_metrics_are_those_of_scikit_learn(ours: Callable, theirs: Callable, decimals: int) -> None:
    scores, targets = cohort(decimals)
    expected = by_class(theirs, scores >= THRESHOLDS if ours in DECISIONS else scores, targets)
    np.testing.assert_allclose(measured(ours, scores, targets), expected, rtol=1e-12)


def test_rankings_do_not_change_with_the_scale_of_scores_or_the_order_of_samples() -> None:
    scores, targets = cohort(decimals=2)
    order = np.random.default_rng(0).permutation(N)
    for metric in (auroc, average_precision):
        np.testing.assert_array_equal(metric(np.exp(5 * scores) - 40, targets), metric(scores, targets))
        np.testing.assert_allclose(metric(scores[order], targets[order]), metric(scores, targets), rtol=1e-14)
    infinite = np.array([[-np.inf], [0.0], [np.inf], [1.0]])
    np.testing.assert_array_equal(auroc(infinite, [[0], [0], [1], [1]]), [1.0])


@pytest.mark.parametrize("decimals", [16, 1])
def test_thresholds_have_the_best_f1_of_all_and_are_the_highest_of_equals(decimals: int) -> None:
    scores, targets = cohort(decimals)
    thresholds = f1_thresholds(scores, targets)
    for label in range(C):
        candidates = sorted(set(scores[:, label]), reverse=True)
        values = [sklearn_metrics.f1_score(targets[:, label], scores[:, label] >= t) for t in candidates]
        assert thresholds[label] == candidates[int(np.argmax(np.round(values, 12)))]
    assert np.all(f1(scores, targets, thresholds) >= f1(scores, targets, THRESHOLDS))
    # at 0.9: 1 hit of 1, F1 = 2/3; at 0.1: 2 hits of 4, F1 = 2/3
    scores, targets = np.array([[0.9], [0.5], [0.4], [0.1]]), np.array([[1], [0], [0], [1]])
    np.testing.assert_array_equal(f1_thresholds(scores, targets), [0.9])


def test_score_equal_to_the_threshold_is_predicted_positive() -> None:
    assert f1([[0.5], [0.4]], [[1], [0]], thresholds=[0.5]).tolist() == [1.0]


@pytest.mark.parametrize("metric", RANKINGS + DECISIONS)
@pytest.mark.parametrize("probes", [(P,), (2, P), (0,)])
def test_each_probe_is_measured_by_itself(metric: Callable, probes: tuple[int, ...]) -> None:
    scores, targets = cohort(decimals=1, probes=probes)
    together = measured(metric, scores, targets)
    assert together.shape == (*probes, C)
    for index in np.ndindex(probes):
        np.testing.assert_array_equal(together[index], measured(metric, scores[index], targets))


@pytest.mark.filterwarnings("error")
def test_undefined_classes_are_nan_and_never_zero() -> None:
    scores = np.array([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9]])
    targets = np.array([[0, 0, 1], [1, 0, 1]])  # both, only negatives, only positives
    half = [0.5, 0.5, 0.5]
    np.testing.assert_array_equal(auroc(scores, targets), [1, math.nan, math.nan])
    np.testing.assert_array_equal(average_precision(scores, targets), [1, math.nan, 1])
    np.testing.assert_array_equal(f1_thresholds(scores, targets), [0.7, 0.5, 0.3])
    np.testing.assert_allclose(f1(scores, targets, half), [1, math.nan, 2 / 3])
    np.testing.assert_array_equal(balanced_accuracy(scores, targets, half), [1, math.nan, math.nan])
    # a class without a positive stays undefined when nothing is predicted, a class with one is then 0
    np.testing.assert_array_equal(f1(scores, targets, [2, 2, 2]), [0, math.nan, 0])


@pytest.mark.filterwarnings("error")
def test_macro_leaves_undefined_classes_out_and_names_them() -> None:
    names = ["Emphysema", "Nodule", "Hernia"]
    assert macro(np.array([0.25, math.nan, 0.75]), names) == (0.5, ["Nodule"])
    assert macro([0.25, 0.5, 0.75], names) == (0.5, [])
    mean, undefined = macro([math.nan] * 3, names)
    assert math.isnan(mean)
    assert undefined == names
    with pytest.raises(ValueError, match=r"values .* \(2,\) .* got \(3,\)\."):
        macro([0.1, 0.2, 0.3], names[:2])


def test_report_holds_macro_means_undefined_names_and_every_class() -> None:
    scores, targets = cohort()
    targets[:, 2] = 0
    names = [f"finding {label}" for label in range(C)]
    report = multilabel_report(scores, targets, THRESHOLDS, names)
    expected = {
        "auroc": auroc(scores, targets),
        "auprc": average_precision(scores, targets),
        "f1": f1(scores, targets, THRESHOLDS),
        "balanced_accuracy": balanced_accuracy(scores, targets, THRESHOLDS),
    }
    assert list(report["per_class"]) == names
    for metric, values in expected.items():
        assert report["macro"][metric] == pytest.approx(np.delete(values, 2).mean(), rel=1e-12)
        assert report["undefined"][metric] == ["finding 2"]
        np.testing.assert_array_equal([report["per_class"][name][metric] for name in names], values)
    assert report["macro"].keys() == expected.keys()


def test_float32_and_boolean_inputs_are_measured_in_float64() -> None:
    scores, targets = cohort()
    single = scores.astype(np.float32)
    values = auroc(single, targets.astype(bool))
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, auroc(single.astype(np.float64), targets))


def damaged(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.astype(float)
    copy[5, 3] = value
    return copy


@pytest.mark.parametrize("metric", RANKINGS + DECISIONS)
def test_impossible_scores_and_targets_are_refused(metric: Callable) -> None:
    scores, targets = cohort()
    for given, message in (
        ((damaged(scores, math.nan), targets), "scores .*nan for sample 5, class 3"),
        ((scores, damaged(targets, 0.3)), "targets .* 0.3 for sample 5, class 3"),
        ((scores, damaged(targets, math.nan)), "targets .* nan for sample 5, class 3"),
        ((scores[1:], targets), r"scores .*\(101, 7\).*got \(100, 7\)"),
        ((np.zeros((0, C)), np.zeros((0, C))), r"targets .* got \(0, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(metric, *given)


@pytest.mark.parametrize("metric", DECISIONS)
def test_impossible_thresholds_are_refused(metric: Callable) -> None:
    scores, targets = cohort()
    with pytest.raises(ValueError, match=r"thresholds .* \(7,\) .* got \(6,\)\."):
        metric(scores, targets, THRESHOLDS[1:])
    with pytest.raises(ValueError, match=r"thresholds .* nan for class 4\."):
        metric(scores, targets, [*THRESHOLDS[:4], math.nan, *THRESHOLDS[5:]])


def sample(size: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    probabilities = rng.random(size) ** 3
    return probabilities, (rng.random(size) < probabilities).astype(int)


def test_bins_are_those_of_scikit_learn() -> None:
    probabilities, targets = sample()
    observed, predicted = calibration_curve(targets, probabilities, n_bins=10, strategy="quantile")
    bins = reliability(probabilities, targets, num_bins=10)
    np.testing.assert_allclose(bins.predicted, predicted, rtol=1e-12)
    np.testing.assert_allclose(bins.observed, observed, rtol=1e-12)
    assert bins.counts.tolist() == [50] * 10


def test_true_probabilities_have_a_small_error_and_shifted_ones_their_shift() -> None:
    probabilities, targets = sample(20_000)
    assert expected_calibration_error(reliability(probabilities, targets)) < 0.02
    shifted = 0.1 + 0.5 * probabilities
    errors = np.abs(shifted - probabilities).mean()
    assert expected_calibration_error(reliability(shifted, targets, 50)) == pytest.approx(errors, abs=0.02)


def test_a_bin_counts_by_its_samples_and_few_samples_get_a_bin_each() -> None:
    # three samples off by 0.1 and two off by 0.4
    bins = reliability([0.1, 0.1, 0.1, 0.6, 0.6], [0, 0, 0, 1, 1], num_bins=2)
    assert bins.counts.tolist() == [3, 2]
    assert expected_calibration_error(bins) == pytest.approx((3 * 0.1 + 2 * 0.4) / 5)
    bins = reliability([0.9, 0.1, 0.5], [1, 0, 0], num_bins=10)
    assert (bins.predicted.tolist(), bins.observed.tolist()) == ([0.1, 0.5, 0.9], [0, 0, 1])
    with pytest.raises(ValueError, match=r"probabilities and targets .*\(2,\) and \(3,\)"):
        reliability([0.1, 0.2], [0, 1, 0])
