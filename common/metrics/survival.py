"""Time to an event: Cox regression with a ridge penalty, Harrell's C-index, and Kaplan-Meier curves."""

# N volumes, D features, R resamples, K distinct times

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from common.metrics.multilabel import ratio

FloatArray = NDArray[np.float64]


def partial_log_likelihood(risks: ArrayLike, times: ArrayLike, events: ArrayLike) -> tuple[float, FloatArray]:
    """Return Cox's log partial likelihood of log hazards, and its gradient.

    Sum over the events of a volume's log hazard, less the log of the summed hazards of all volumes whose time
    is not shorter. Ties are Breslow's.

    Source: Cox, JRSS B 34 (1972); Breslow, Biometrics 30 (1974).

    Args:
        risks: log hazards ``(N,)``.
        times: ``(N,)``, to the event or to when the patient was last seen.
        events: ``(N,)``, 1 where the event happened.

    Example:
        >>> round(partial_log_likelihood([0.0, 0.0, 0.0], [3, 1, 2], [1, 1, 0])[0], 4)  # -log 3 - log 1
        -1.0986
    """
    descending = np.argsort(-np.asarray(times, np.float64), kind="stable")
    risk, time = (np.asarray(values, np.float64)[descending] for values in (risks, times))
    event = np.asarray(events)[descending] == 1
    first, last = (np.searchsorted(-time, -time, side) for side in ("left", "right"))
    at_risk = np.logaddexp.accumulate(risk)[last - 1]
    summed = np.logaddexp.accumulate(np.where(event, -at_risk, -np.inf)[::-1])[::-1]
    gradient = np.empty(len(risk))
    gradient[descending] = event - np.exp(risk + summed[first])
    return float((risk - at_risk)[event].sum()), gradient


def cox(features: ArrayLike, times: ArrayLike, events: ArrayLike, penalty: float) -> FloatArray:
    """Fit the weights ``(D,)`` of log hazards.

    They have the most likelihood per event, less ``penalty / 2`` times their squared length.

    Args:
        features: ``(N, D)``, each of about the same spread.
        times: ``(N,)``.
        events: ``(N,)``.
        penalty: positive.

    Raises:
        ValueError: if there is no event.
    """
    x, num_events = np.asarray(features, np.float64), int(np.sum(events))
    if num_events == 0:
        raise ValueError(f"events must hold at least one event, got none of {len(x)}.")

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        value, gradient = partial_log_likelihood(x @ weights, times, events)
        squared = float(weights @ weights)
        return penalty / 2 * squared - value / num_events, penalty * weights - x.T @ gradient / num_events

    options = {"maxiter": 1000, "gtol": 1e-7, "ftol": 1e-12}
    found: FloatArray = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options).x
    return found


def concordance(risks: ArrayLike, times: ArrayLike, events: ArrayLike, weights: ArrayLike) -> FloatArray:
    """Return Harrell's C-index on every resample.

    It says how often of two volumes the one with the earlier event has the higher risk. Two can be compared
    if the one with the shorter time had the event, or of equal times one of both had. Equal risks count one
    half.

    Source: Harrell et al., JAMA 247 (1982).

    Args:
        risks: ``(N,)``, higher for earlier.
        times: ``(N,)``.
        events: ``(N,)``.
        weights: how often each volume is in each resample, ``(R, N)``.

    Returns:
        ``(R,)``; nan where no two can be compared.

    Example:
        >>> concordance([2.0, 1.0, 1.0], [1, 2, 3], [1, 1, 0], np.ones((1, 3))).tolist()  # 2.5 of 3
        [0.8333333333333334]
    """
    risk, time = np.asarray(risks, np.float64), np.asarray(times, np.float64)
    event, weight = np.asarray(events) == 1, np.asarray(weights, np.float32)
    is_earlier = (time[:, None] < time) | ((time[:, None] == time) & ~event)
    comparable = (event[:, None] & is_earlier).astype(np.float32)
    right = comparable * ((risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)).astype(np.float32)
    sums = [((weight @ pairs).astype(np.float64) * weight).sum(1) for pairs in (right, comparable)]
    return ratio(*sums)


def kaplan_meier(times: ArrayLike, events: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the distinct times and the share without event after each, both ``(K,)``.

    Source: Kaplan and Meier, JASA 53 (1958).

    Example:
        >>> times, shares = kaplan_meier([1, 2, 2, 3], [1, 1, 0, 1])
        >>> times.tolist(), shares.tolist()
        ([1.0, 2.0, 3.0], [0.75, 0.5, 0.0])
    """
    time, event = np.asarray(times, np.float64), np.asarray(events, np.float64)
    distinct, place = np.unique(time, return_inverse=True)
    at_risk = (time[None] >= distinct[:, None]).sum(1)
    return distinct, np.cumprod(1 - np.bincount(place, event, len(distinct)) / at_risk)
