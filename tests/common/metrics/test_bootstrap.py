"""The bootstrap against scikit-learn on resamples that are written out."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from common.metrics.bootstrap import (
    bootstrap,
    groups_of,
    interval,
    macro_means,
    resample_weights,
    resampled_areas,
    two_sided_p,
)

# N samples, C classes, R resamples: all different
N, C, R = 67, 4, 11
PATIENTS = [f"valid_{1 + index // 3}" for index in range(N)]
THRESHOLDS = np.array([0.3, 0.5, 0.5, 0.7])
ONE = np.ones((1, 2))


def cohort(decimals: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    targets = (rng.random((N, C)) < [0.05, 0.2, 0.5, 0.9]).astype(int)
    return (rng.random((N, C)) * 0.8 + 0.2 * targets).round(decimals), targets


@pytest.mark.parametrize("decimals", [16, 2, 1, 0])  # from no ties to nearly nothing but ties
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.filterwarnings("ignore:y_pred contains classes:UserWarning")
def test_every_resample_has_the_metrics_of_scikit_learn(decimals: int) -> None:
    scores, targets = cohort(decimals)
    weights = resample_weights(PATIENTS, R, seed=1)
    values = bootstrap(scores, targets, THRESHOLDS, weights)
    undefined = 0
    for resample in range(R):
        rows = np.repeat(np.arange(N), weights[resample].astype(int))
        for label in range(C):
            y, s = targets[rows, label], scores[rows, label]
            called = s >= THRESHOLDS[label]
            got = {name: value[resample, label] for name, value in values.items()}
            if y.all() or not y.any():
                undefined += 1
                assert math.isnan(got["auroc"])
                assert math.isnan(got["balanced_accuracy"])
                assert math.isnan(got["auprc"]) == math.isnan(got["f1"]) == (not y.any())
                continue
            assert got["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)
            assert got["auprc"] == pytest.approx(sklearn_metrics.average_precision_score(y, s), abs=1e-12)
            assert got["f1"] == pytest.approx(sklearn_metrics.f1_score(y, called), abs=1e-12)
            assert got["balanced_accuracy"] == pytest.approx(
                sklearn_metrics.balanced_accuracy_score(y, called), abs=1e-12
            )
    assert undefined < R * C / 2


def test_chunks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, targets = cohort(decimals=1)
    weights = resample_weights(PATIENTS, R, seed=1)
    whole = bootstrap(scores, targets, THRESHOLDS, weights)
    monkeypatch.setattr("common.metrics.bootstrap.RESAMPLES_PER_CHUNK", 4)
    for name, values in bootstrap(scores, targets, THRESHOLDS, weights).items():
        np.testing.assert_array_equal(values, whole[name])


@pytest.mark.filterwarnings("error")
def test_class_without_positives_is_undefined_and_left_out_of_means_and_intervals() -> None:
    scores, targets = cohort()
    targets[:, 2] = 0
    values = bootstrap(scores, targets, THRESHOLDS, resample_weights(PATIENTS, R, seed=1))
    assert all(np.isnan(of_metric[:, 2]).all() for of_metric in values.values())
    assert np.isfinite(values["f1"][:, 3]).all()
    np.testing.assert_array_equal(macro_means([[0.25, math.nan, 0.75], [math.nan] * 3]), [0.5, math.nan])
    assert interval([0.0, math.nan, 1.0, 2.0, math.nan]) == pytest.approx((0.05, 1.95))
    assert all(math.isnan(end) for end in interval([math.nan, math.nan]))


def test_resamples_draw_whole_patients_as_many_as_there_are() -> None:
    weights = resample_weights(PATIENTS, 200, seed=3)
    by_patient = {patient: weights[:, [p == patient for p in PATIENTS]] for patient in set(PATIENTS)}
    assert all((of_one == of_one[:, :1]).all() for of_one in by_patient.values())
    drawn = sum(of_one[:, 0] for of_one in by_patient.values())
    np.testing.assert_array_equal(drawn, len(by_patient))
    # a patient's count is binomial(n, 1 / n): mean 1, variance 1 - 1 / n
    counts = np.stack([of_one[:, 0] for of_one in by_patient.values()])
    assert counts.mean() == pytest.approx(1.0)
    assert counts.var() == pytest.approx(1 - 1 / len(by_patient), rel=0.05)


def test_resamples_are_the_same_for_the_same_patients_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(N)
    weights = resample_weights(PATIENTS, R, seed=3)
    shuffled = resample_weights([PATIENTS[index] for index in order], R, seed=3)
    np.testing.assert_array_equal(shuffled, weights[:, order])
    assert not np.array_equal(resample_weights(PATIENTS, R, seed=4), weights)


def test_interval_covers_the_mean_of_a_normal_sample_as_often_as_it_says() -> None:
    # the mean of ones and zeros: F1 with everything called is 2p / (1 + p), so p's interval maps onto it
    rng, covered = np.random.default_rng(0), 0
    expected = 2 * 0.4 / 1.4
    for trial in range(200):
        targets = (rng.random((80, 1)) < 0.4).astype(int)
        weights = resample_weights([f"a_{index}" for index in range(80)], 300, seed=trial)
        low, high = interval(bootstrap(np.ones((80, 1)), targets, [0.5], weights)["f1"][:, 0])
        covered += low <= expected <= high
    assert 0.90 <= covered / 200 <= 0.98


def test_p_is_small_for_a_sure_difference_and_one_for_none() -> None:
    assert two_sided_p(np.full(1999, 0.01)) == pytest.approx(2 / 2000)
    assert two_sided_p(np.zeros(50)) == 1.0
    assert two_sided_p([-1.0, *[1.0] * 38]) == pytest.approx(2 * 2 / 40)
    assert two_sided_p([1.0, *[-1.0] * 38]) == pytest.approx(2 * 2 / 40)
    assert math.isnan(two_sided_p([math.nan]))


def draw(seed: int, samples: int, patients: int, ties: bool):
    rng = np.random.default_rng(seed)
    targets = rng.random(samples) < 0.2
    scores = rng.standard_normal(samples) + targets
    scores = scores.round(1) if ties else scores
    weights = rng.multinomial(patients, np.full(patients, 1 / patients), size=7).astype(float)
    return scores.astype(np.float32), targets, rng.integers(0, patients, samples), weights


@pytest.mark.parametrize("ties", [True, False])
def test_areas_are_sklearns_with_the_draws_as_weights(ties: bool) -> None:
    scores, targets, patients, weights = draw(0, samples=503, patients=11, ties=ties)
    auroc, auprc = resampled_areas(scores, targets, patients, weights)
    for resample, weight in enumerate(weights):
        drawn = {"sample_weight": weight[patients]}
        expected = sklearn_metrics.roc_auc_score(targets, scores, **drawn)
        assert auroc[resample] == pytest.approx(expected, abs=1e-12)
        expected = sklearn_metrics.average_precision_score(targets, scores, **drawn)
        assert auprc[resample] == pytest.approx(expected, abs=1e-12)


def test_shared_levels_change_the_areas_by_less_than_a_thousandth() -> None:
    scores, targets, patients, weights = draw(2, samples=60_000, patients=13, ties=False)
    exact = resampled_areas(scores, targets, patients, weights)
    shared = resampled_areas(scores, targets, patients, weights, max_levels=1024)
    for one, other in zip(exact, shared, strict=True):
        assert 0 < np.abs(one - other).max() < 1e-3


def test_a_resample_without_a_positive_is_undefined() -> None:
    weights = np.array([[0.0, 2, 1], [1, 1, 1], [3, 0, 0]])
    auroc, auprc = resampled_areas([0.3, 0.2, 0.1], [1, 0, 0], [0, 1, 2], weights)
    assert np.isnan(auroc).tolist() == [True, False, True]
    assert np.isnan(auprc).tolist() == [True, False, False]
    assert np.isnan(resampled_areas([0.3, 0.2], [0, 0], [0, 1], np.ones((1, 2)))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: groups_of(["a"], "scans"), "resampling .* got 'scans'"),
        (lambda: resample_weights([], 5, seed=0), "num_resamples .* got 5 and 0"),
        (lambda: resample_weights(["train_1"], 0, seed=0), "num_resamples .* got 0 and 1"),
        (lambda: bootstrap(*cohort(), THRESHOLDS, np.ones((5, 66))), r"\(67, 4\), \(67, 4\) and \(5, 66\)"),
        (lambda: resampled_areas([0.1, 0.2], [0, 1, 0], [0, 1], ONE), r"\(2,\), \(3,\) and \(2,\)"),
        (lambda: resampled_areas([0.1, math.nan], [0, 1], [0, 1], ONE), "scores .* nan for sample 1"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
