from math import exp, log

import numpy as np
import pytest
from scipy.optimize import check_grad, minimize

from common.metrics.survival import concordance, cox, kaplan_meier, partial_log_likelihood


@pytest.fixture
def cohort():
    """Features, times with ties, and events of 40 volumes; the first feature counts."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(40, 5))
    times = np.ceil(rng.exponential(np.exp(-1.5 * features[:, 0])) * 4)
    return features, times, (rng.random(40) < 0.6).astype(float)


def slow_likelihood(risks, times, events):
    total = 0.0
    for i in range(len(risks)):
        if events[i]:
            total += risks[i] - log(sum(exp(risks[j]) for j in range(len(risks)) if times[j] >= times[i]))
    return total


def test_likelihood_is_that_of_a_loop_and_its_gradient_that_of_differences(cohort):
    features, times, events = cohort
    risks = features @ [0.4, -0.2, 0.0, 1.0, 0.3]
    assert partial_log_likelihood(risks, times, events)[0] == pytest.approx(
        slow_likelihood(risks, times, events)
    )
    error = check_grad(
        lambda r: partial_log_likelihood(r, times, events)[0],
        lambda r: partial_log_likelihood(r, times, events)[1],
        risks,
    )
    assert error < 1e-5
    value, gradient = partial_log_likelihood(1e3 * risks, times, events)  # no overflow
    assert np.isfinite([value, *gradient]).all()


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_cox_finds_the_weights_of_a_search_without_gradient(cohort, penalty):
    features, times, events = cohort

    def loss(weights):
        return penalty / 2 * weights @ weights - slow_likelihood(features @ weights, times, events) / sum(
            events
        )

    expected = minimize(
        loss, np.zeros(5), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000}
    ).x
    found = cox(features, times, events, penalty)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if penalty < 1:
        assert found[0] > 0.8
        assert abs(found[1:]).max() < found[0] / 2


def test_cox_needs_an_event(cohort):
    features, times, events = cohort
    with pytest.raises(ValueError, match="at least one event, got none of 40"):
        cox(features, times, np.zeros_like(events), 1.0)


def test_concordance_is_that_of_resamples_written_out(cohort):
    features, times, events = cohort
    rng = np.random.default_rng(1)
    risks = np.round(features[:, 0], 1)  # ties
    weights = rng.multinomial(40, np.full(40, 1 / 40), 5)
    found = concordance(risks, times, events, weights)
    for value, weight in zip(found, weights, strict=True):
        r, t, e = (np.repeat(values, weight) for values in (risks, times, events))
        right = pairs = 0.0
        for i in range(len(r)):
            for j in range(len(r)):
                if e[i] and (t[i] < t[j] or (t[i] == t[j] and not e[j])):
                    pairs += 1
                    right += 1.0 if r[i] > r[j] else 0.5 if r[i] == r[j] else 0.0
        assert value == pytest.approx(right / pairs)
    assert concordance(np.zeros(40), times, events, np.ones((1, 40)))[0] == 0.5
    assert np.isnan(concordance(risks, times, np.zeros(40), np.ones((1, 40)))).all()


def test_kaplan_meier_is_a_product_over_the_event_times(cohort):
    _, times, events = cohort
    distinct, shares = kaplan_meier(times, events)
    expected = 1.0
    for time, share in zip(distinct, shares, strict=True):
        at_risk = sum(t >= time for t in times)
        expected *= 1 - sum(e for t, e in zip(times, events, strict=True) if t == time) / at_risk
        assert share == pytest.approx(expected)
