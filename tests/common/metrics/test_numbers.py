import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score

from common.metrics.numbers import number_metrics


def test_metrics_are_those_of_resamples_written_out():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 23).astype(float)  # ties
    predicted = np.round(truth + rng.normal(0, 2, 23))
    weights = rng.multinomial(23, np.full(23, 1 / 23), 9)
    found = number_metrics(predicted, truth, weights)
    for row, weight in enumerate(weights):
        one, other = np.repeat(predicted, weight), np.repeat(truth, weight)
        assert found["r2"][row] == pytest.approx(r2_score(other, one))
        assert found["mae"][row] == pytest.approx(mean_absolute_error(other, one))
        assert found["spearman"][row] == pytest.approx(spearmanr(one, other)[0])


def test_what_a_constant_leaves_undefined():
    found = number_metrics([1.0, 2.0, 3.0], [5.0, 5.0, 6.0], [[2, 1, 0], [1, 1, 1]])
    assert np.isnan(found["r2"]).tolist() == [True, False]
    assert np.isnan(found["spearman"]).tolist() == [True, False]
    assert found["mae"][0] == pytest.approx((4 + 4 + 3) / 3)
    assert np.isnan(number_metrics([4.0, 4.0], [1.0, 2.0], [[1, 1]])["spearman"]).all()
