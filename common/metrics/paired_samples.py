"""Means over volumes with errors over patients, and two encoders compared on the same volumes."""

# N volumes, G patients, R resamples

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import wilcoxon

from common.cohort.cohort import patient_of
from common.metrics.bootstrap import interval, resample_weights

FloatArray = NDArray[np.float64]

NUM_FLIPS = 10_000
"""Random sign flips of the permutation test: the smallest p-value is 1e-4. Our choice."""


class Mean(NamedTuple):
    """A mean over ``n`` volumes, its standard error and its 95 % bootstrap interval, both over patients."""

    value: float
    error: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """One encoder against another on the same volumes."""

    difference: Mean
    p_wilcoxon: float  # two-sided signed-rank test of the patients' mean differences
    p_permutation: float  # two-sided test by random flips of their signs
    num_patients: int


def mean_over_volumes(values: ArrayLike, volumes: Sequence[str], num_resamples: int, seed: int) -> Mean:
    """Return a mean over volumes with its error and interval; volumes where it is undefined are left out.

    Scans of one patient are not independent: the standard error is that of a mean of clusters, and resamples
    draw patients. Resamples are the same for all encoders on the same volumes.

    Args:
        values: one per volume ``(N,)``, nan where undefined.
        volumes: names of the volumes, which contain the patient.
        num_resamples: R.
        seed: seed of the resamples.

    Raises:
        ValueError: if there are not as many names as values.

    Example:
        >>> mean = mean_over_volumes([1, 3, 5], ["valid_1_a_1", "valid_2_a_1", "valid_3_a_1"], 100, seed=0)
        >>> mean.value, round(mean.error, 3), mean.n
        (3.0, 1.155, 3)
    """
    array = np.asarray(values, np.float64)
    if array.shape != (len(volumes),):
        raise ValueError(f"values must have shape ({len(volumes)},) as there are volumes, got {array.shape}.")
    known = ~np.isnan(array)
    if not known.any():
        return Mean(np.nan, np.nan, np.nan, np.nan, 0)
    array, patients = array[known], [patient_of(volumes[place]) for place in np.flatnonzero(known).tolist()]
    sums = _by_patient(array - array.mean(), patients)
    groups = len(sums)
    error = np.sqrt(groups / (groups - 1) * (sums**2).sum()) / len(array) if groups > 1 else np.nan
    weights = resample_weights(patients, num_resamples, seed).astype(np.float64)
    low, high = interval(weights @ array / weights.sum(1))
    return Mean(float(array.mean()), float(error), low, high, len(array))


def compare_pairs(
    values: ArrayLike, others: ArrayLike, *, volumes: Sequence[str], num_resamples: int, seed: int
) -> Comparison:
    """Compare a measure of two encoders on the same volumes.

    The tests use one number per patient, the mean of the differences of its volumes. Source: our choice;
    DALE-CT Table V has no test.

    Arguments are those of :func:`mean_over_volumes`; the seed also draws the flips of signs.

    Raises:
        ValueError: if lengths do not agree.
    """
    difference = np.asarray(values, np.float64) - np.asarray(others, np.float64)
    mean = mean_over_volumes(difference, volumes, num_resamples, seed)
    known = ~np.isnan(difference)
    if not known.any():
        return Comparison(mean, np.nan, np.nan, 0)
    patients = [patient_of(volumes[place]) for place in np.flatnonzero(known).tolist()]
    pairs = _by_patient(difference[known], patients) / _by_patient(np.ones(len(patients)), patients)
    p_wilcoxon = float(wilcoxon(pairs).pvalue) if pairs.any() else 1.0
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (NUM_FLIPS, len(pairs)))
    reached = (np.abs(signs @ pairs) >= np.abs(pairs.sum()) * (1 - 1e-12)).sum()
    return Comparison(mean, p_wilcoxon, float((1 + reached) / (1 + NUM_FLIPS)), len(pairs))


def _by_patient(values: FloatArray, patients: Sequence[str]) -> FloatArray:
    _, place = np.unique(patients, return_inverse=True)
    return np.bincount(place, weights=values).astype(np.float64)
