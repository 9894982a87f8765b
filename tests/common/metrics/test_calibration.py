import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from common.metrics.calibration import (
    brier_score,
    expected_calibration_error,
    reliability,
    wilson_interval,
)


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


def test_brier_score_is_that_of_scikit_learn_for_each_class() -> None:
    probabilities, targets = sample()
    p, y = np.stack([probabilities, probabilities[::-1]], 1), np.stack([targets, targets], 1)
    expected = [brier_score_loss(y[:, label], p[:, label]) for label in range(2)]
    np.testing.assert_allclose(brier_score(p, y), expected, rtol=1e-12)


@pytest.mark.parametrize(("positives", "count"), [(0, 10), (3, 10), (10, 10), (7, 212)])
def test_interval_of_a_share_is_that_of_scipy(positives: int, count: int) -> None:
    expected = binomtest(positives, count).proportion_ci(method="wilson")
    low, high = wilson_interval([positives / count], [count])
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_shapes_that_differ_are_refused() -> None:
    message = r"probabilities and targets must have one shape \(N,\) with samples, got \(2,\) and \(3,\)"
    with pytest.raises(ValueError, match=message):
        reliability([0.1, 0.2], [0, 1, 0])
