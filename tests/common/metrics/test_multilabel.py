"""Metrics against scikit-learn, class by class, and against brute force."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from common.metrics.multilabel import (
    auroc,
    auroc_and_average_precision,
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


@pytest.mark.parametrize("decimals", DECIMALS)
def test_auroc_is_that_of_scikit_learn(decimals: int) -> None:
    scores, targets = cohort(decimals)
    expected = by_class(sklearn_metrics.roc_auc_score, scores, targets)
    np.testing.assert_allclose(auroc(scores, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("decimals", DECIMALS)
def test_auroc_is_the_share_of_pairs_in_the_right_order(decimals: int) -> None:
    scores, targets = cohort(decimals)
    for label, value in enumerate(auroc(scores, targets)):
        positive, negative = (scores[targets[:, label] == wanted, label] for wanted in (1, 0))
        pairs = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert value == pytest.approx(sum(pairs) / len(pairs), rel=1e-13)


@pytest.mark.parametrize("decimals", DECIMALS)
def test_average_precision_is_that_of_scikit_learn(decimals: int) -> None:
    scores, targets = cohort(decimals)
    expected = by_class(sklearn_metrics.average_precision_score, scores, targets)
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("decimals", DECIMALS)
def test_average_precision_is_the_area_under_the_steps_of_precision_over_recall(decimals: int) -> None:
    scores, targets = cohort(decimals)
    for label, value in enumerate(average_precision(scores, targets)):
        area = recall_before = 0.0
        for threshold in sorted(set(scores[:, label]), reverse=True):
            chosen = scores[:, label] >= threshold
            hits = targets[chosen, label].sum()
            recall = hits / targets[:, label].sum()
            area += (recall - recall_before) * hits / chosen.sum()
            recall_before = recall
        assert value == pytest.approx(area, rel=1e-12)


@pytest.mark.parametrize("probes", [(), (P,)])
def test_auroc_and_average_precision_come_together(probes: tuple[int, ...]) -> None:
    scores, targets = cohort(decimals=1, probes=probes)
    of_ranking = auroc_and_average_precision(scores, targets)
    np.testing.assert_array_equal(of_ranking[0], auroc(scores, targets))
    np.testing.assert_array_equal(of_ranking[1], average_precision(scores, targets))


def test_constant_scores_have_chance_auroc_and_the_prevalence_as_average_precision() -> None:
    _, targets = cohort()
    constant = np.full((N, C), 0.3)
    np.testing.assert_array_equal(auroc(constant, targets), np.full(C, 0.5))
    np.testing.assert_allclose(average_precision(constant, targets), targets.mean(0), rtol=1e-15)


def test_rankings_do_not_change_with_the_scale_of_scores_or_the_order_of_samples() -> None:
    scores, targets = cohort(decimals=2)
    order = np.random.default_rng(0).permutation(N)
    for metric in (auroc, average_precision):
        np.testing.assert_array_equal(metric(np.exp(5 * scores) - 40, targets), metric(scores, targets))
        np.testing.assert_allclose(metric(scores[order], targets[order]), metric(scores, targets), rtol=1e-14)


def test_infinite_scores_are_ranked() -> None:
    scores = np.array([[-np.inf], [0.0], [np.inf], [1.0]])
    np.testing.assert_array_equal(auroc(scores, [[0], [0], [1], [1]]), [1.0])


@pytest.mark.parametrize("decimals", [16, 1])
def test_thresholds_have_the_best_f1_of_all_and_are_the_highest_of_equals(decimals: int) -> None:
    scores, targets = cohort(decimals)
    thresholds = f1_thresholds(scores, targets)
    for label in range(C):
        candidates = sorted(set(scores[:, label]), reverse=True)
        values = [sklearn_metrics.f1_score(targets[:, label], scores[:, label] >= t) for t in candidates]
        assert thresholds[label] == candidates[int(np.argmax(np.round(values, 12)))]
    assert np.all(f1(scores, targets, thresholds) >= f1(scores, targets, THRESHOLDS))


def test_highest_of_equally_good_thresholds_is_taken() -> None:
    # at 0.9: 1 hit of 1, F1 = 2/3; at 0.1: 2 hits of 4, F1 = 2/3
    scores, targets = np.array([[0.9], [0.5], [0.4], [0.1]]), np.array([[1], [0], [0], [1]])
    np.testing.assert_array_equal(f1_thresholds(scores, targets), [0.9])


@pytest.mark.parametrize("decimals", [16, 1])
def test_f1_and_balanced_accuracy_are_those_of_scikit_learn(decimals: int) -> None:
    scores, targets = cohort(decimals)
    predicted = scores >= THRESHOLDS
    expected = by_class(lambda y, p: sklearn_metrics.f1_score(y, p, zero_division=0), predicted, targets)
    np.testing.assert_allclose(f1(scores, targets, THRESHOLDS), expected, rtol=1e-12)
    expected = by_class(sklearn_metrics.balanced_accuracy_score, predicted, targets)
    np.testing.assert_allclose(balanced_accuracy(scores, targets, THRESHOLDS), expected, rtol=1e-12)


def test_score_equal_to_the_threshold_is_predicted_positive() -> None:
    assert f1([[0.5], [0.4]], [[1], [0]], thresholds=[0.5]).tolist() == [1.0]


@pytest.mark.parametrize("metric", RANKINGS)
@pytest.mark.parametrize("probes", [(P,), (2, P), (0,)])
def test_probes_are_measured_each_for_itself(metric: Callable, probes: tuple[int, ...]) -> None:
    scores, targets = cohort(decimals=1, probes=probes)
    together = metric(scores, targets)
    assert together.shape == (*probes, C)
    for index in np.ndindex(probes):
        np.testing.assert_array_equal(together[index], metric(scores[index], targets))


@pytest.mark.parametrize("metric", DECISIONS)
def test_decisions_of_probes_are_measured_each_for_itself(metric: Callable) -> None:
    scores, targets = cohort(probes=(P,))
    thresholds = f1_thresholds(scores, targets)
    together = metric(scores, targets, thresholds)
    assert together.shape == (P, C)
    for probe in range(P):
        np.testing.assert_array_equal(together[probe], metric(scores[probe], targets, thresholds[probe]))


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


def measured(metric: Callable, scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    arguments = (THRESHOLDS[: targets.shape[-1]],) if metric in DECISIONS else ()
    return metric(scores, targets, *arguments)


@pytest.mark.parametrize("metric", RANKINGS + DECISIONS)
def test_nan_scores_are_refused(metric: Callable) -> None:
    scores, targets = cohort()
    scores[5, 3] = math.nan
    with pytest.raises(ValueError, match=r"scores must not be nan, got nan for sample 5, class 3\."):
        measured(metric, scores, targets)


@pytest.mark.parametrize("metric", RANKINGS + DECISIONS)
@pytest.mark.parametrize("value", [0.3, math.nan])
def test_targets_other_than_0_and_1_are_refused(metric: Callable, value: float) -> None:
    scores, targets = cohort()
    soft = targets.astype(float)
    soft[5, 3] = value
    with pytest.raises(ValueError, match=rf"targets must be 0 or 1, got {value} for sample 5, class 3\."):
        measured(metric, scores, soft)


@pytest.mark.parametrize("metric", RANKINGS + DECISIONS)
def test_scores_of_another_shape_are_refused(metric: Callable) -> None:
    scores, targets = cohort()
    message = (
        r"scores must have shape \(\.\.\., N, C\) with \(N, C\) = \(101, 7\) as the targets, got \(100, 7\)\."
    )
    with pytest.raises(ValueError, match=message):
        measured(metric, scores[1:], targets)


@pytest.mark.parametrize("metric", RANKINGS + DECISIONS)
def test_targets_without_samples_are_refused(metric: Callable) -> None:
    with pytest.raises(ValueError, match=r"targets must have shape \(N, C\) with samples, got \(0, 7\)\."):
        measured(metric, np.zeros((0, C)), np.zeros((0, C)))


@pytest.mark.parametrize("metric", DECISIONS)
def test_impossible_thresholds_are_refused(metric: Callable) -> None:
    scores, targets = cohort()
    with pytest.raises(
        ValueError, match=r"thresholds must have shape \(7,\) to fit the scores, got \(6,\)\."
    ):
        metric(scores, targets, THRESHOLDS[1:])
    thresholds = THRESHOLDS.copy()
    thresholds[4] = math.nan
    with pytest.raises(ValueError, match=r"thresholds must not be nan, got nan for class 4\."):
        metric(scores, targets, thresholds)


def test_names_must_be_as_many_as_classes() -> None:
    with pytest.raises(ValueError, match=r"values must have shape \(2,\) as there are names, got \(3,\)\."):
        macro([0.1, 0.2, 0.3], ["Emphysema", "Nodule"])


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


def test_honest_probabilities_have_a_small_error_and_shifted_ones_their_shift() -> None:
    probabilities, targets = sample(20_000)
    assert expected_calibration_error(reliability(probabilities, targets)) < 0.02
    shifted = 0.1 + 0.5 * probabilities
    errors = np.abs(shifted - probabilities).mean()
    assert expected_calibration_error(reliability(shifted, targets, 50)) == pytest.approx(errors, abs=0.02)


def test_a_bin_counts_by_its_samples() -> None:
    # three samples off by 0.1 and two off by 0.4
    bins = reliability([0.1, 0.1, 0.1, 0.6, 0.6], [0, 0, 0, 1, 1], num_bins=2)
    assert bins.counts.tolist() == [3, 2]
    assert expected_calibration_error(bins) == pytest.approx((3 * 0.1 + 2 * 0.4) / 5)


def test_few_samples_get_a_bin_each() -> None:
    bins = reliability([0.9, 0.1, 0.5], [1, 0, 0], num_bins=10)
    assert bins.predicted.tolist() == [0.1, 0.5, 0.9]
    assert bins.observed.tolist() == [0, 0, 1]


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"probabilities and targets .*\(2,\) and \(3,\)"):
        reliability([0.1, 0.2], [0, 1, 0])
