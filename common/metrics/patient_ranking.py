"""AUROC and AUPRC of millions of samples over thousands of resamples of their patients, from counts."""

# N samples, G patients, K steps of the ranking, R resamples

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

RESAMPLES_PER_CHUNK = 250
"""Resamples at a time; bounds memory, changes no number."""


class PatientRanking(NamedTuple):
    """One class's samples by patient and by step of the ranking, best scores first.

    A step ends at a score that positives have. It holds them, the negatives of the same score, and the
    negatives between it and the step above.

    Args:
        positives: ``(G, K)``.
        tied: negatives that count as tied with the step's positives, ``(G, K)``.
        above: other negatives of the step, ``(G, K)``.
        below: negatives below all positives, ``(G,)``.
    """

    positives: FloatArray
    tied: FloatArray
    above: FloatArray
    below: FloatArray


def rank_by_patient(
    scores: ArrayLike, targets: ArrayLike, patients: ArrayLike, num_patients: int, max_steps: int = 4096
) -> PatientRanking:
    """Count a class's samples by patient and step.

    Exact while the positives have at most ``max_steps`` different scores; with more, neighbours among them
    share a step and count as tied.

    Args:
        scores: higher means more likely.
        targets: 0 or 1.
        patients: number of each sample's patient.
        num_patients: G.
        max_steps: K is at most this. Our choice: with 4,096 the areas are off by less than 1e-3.

    Shape:
        ``scores``, ``targets`` and ``patients`` ``(N,)``.

    Raises:
        ValueError: if shapes do not agree or a score is nan.

    Example:
        >>> ranking = rank_by_patient([0.9, 0.8, 0.8, 0.1], [1, 0, 1, 0], [0, 0, 1, 1], num_patients=2)
        >>> [counts.tolist() for counts in ranking]
        [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [0.0, 1.0]]
    """
    score, target, patient = np.asarray(scores), np.asarray(targets, bool), np.asarray(patients)
    if not score.shape == target.shape == patient.shape or score.ndim != 1:
        raise ValueError(
            f"scores, targets and patients must have one shape (N,), got {score.shape}, {target.shape} and "
            f"{patient.shape}."
        )
    if np.isnan(score).any():
        raise ValueError(f"scores must not be nan, got nan for sample {int(np.isnan(score).argmax())}.")
    ends = np.unique(score[target])  # ascending: step k of the ranking is the end len(ends) - 1 - k
    merged = len(ends) > max_steps
    if merged:
        ends = ends[np.linspace(0, len(ends) - 1, max_steps).round().astype(np.intp)]
    steps = len(ends)
    reached = np.searchsorted(ends, score, side="right")  # number of ends at or below a score
    below = reached == 0

    def count(chosen: NDArray[np.bool_]) -> FloatArray:
        chosen = chosen & ~below
        place = patient[chosen] * steps + (steps - reached[chosen])
        return np.bincount(place, minlength=num_patients * steps).reshape(num_patients, steps).astype(float)

    tied = ~target if merged else ~target & (score == ends[np.maximum(reached, 1) - 1] if steps else False)
    return PatientRanking(
        positives=count(target),
        tied=count(tied),
        above=count(~target & ~tied),
        below=np.bincount(patient[~target & below], minlength=num_patients).astype(float),
    )


def resampled_areas(ranking: PatientRanking, weights: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return AUROC and AUPRC of a class for each resample of the patients.

    Source: equals ``sklearn.metrics`` with the number of times that a patient was drawn as the weight of its
    samples.

    Args:
        ranking: of :func:`rank_by_patient`.
        weights: how often each resample holds each patient.

    Shape:
        ``weights (R, G)``. Output: two ``(R,)``, nan where a resample lacks positives, for AUROC negatives.

    Example:
        >>> ranking = rank_by_patient([0.9, 0.8, 0.8, 0.1], [1, 0, 1, 0], [0, 0, 1, 1], num_patients=2)
        >>> auroc, auprc = resampled_areas(ranking, [[1, 1], [2, 0]])
        >>> auroc.tolist(), auprc.round(3).tolist()
        ([0.875, 1.0], [0.833, 1.0])
    """
    weight = np.asarray(weights, float)
    chunks = [
        _areas(ranking, weight[first : first + RESAMPLES_PER_CHUNK])
        for first in range(0, len(weight), RESAMPLES_PER_CHUNK)
    ]
    auroc, auprc = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return auroc, auprc


def _areas(ranking: PatientRanking, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    positives, tied, above = (weight @ counts for counts in ranking[:3])
    below = weight @ ranking.below
    num_positives = positives.sum(1)
    false = (tied + above).cumsum(1)
    num_negatives = (false[:, -1] if false.shape[1] else 0) + below
    hits = positives.cumsum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # a step without a positive in the resample weighs nothing
        precision = np.where(positives > 0, hits / (hits + false), 0)
        auprc = (positives * precision).sum(1) / num_positives
        beaten = num_negatives[:, None] - false + tied / 2
        auroc = (positives * beaten).sum(1) / (num_positives * num_negatives)
    return auroc, auprc
