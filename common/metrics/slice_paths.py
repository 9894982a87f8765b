"""The path of a volume's slices through latent space: how straight it is, and whether it keeps order."""

# S slices, D embedding, K gaps

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

FloatArray = NDArray[np.float64]


def _length(vectors: FloatArray) -> FloatArray:
    lengths: FloatArray = np.linalg.norm(vectors, axis=-1)
    return lengths


DISTANCES: Mapping[str, Callable[[FloatArray, FloatArray], FloatArray]] = {
    # 1 less the product of unit vectors, but 0 where they are equal
    "cosine": lambda one, other: _length(one - other) ** 2 / 2,
    "chord": lambda one, other: _length(one - other),
    # stable for close vectors, where the arc cosine of a rounded product is noise
    "geodesic": lambda one, other: 2 * np.arctan2(_length(one - other), _length(one + other)),
}
"""Distances of unit vectors. The paper's is ``cosine``, which is no metric: a score of it may exceed 1."""


def latent_continuity(embeddings: ArrayLike, distance: str = "cosine") -> float:
    """Return the distance between the first and the last slice over the sum of those between neighbours.

    The straighter the path, the larger the score. For the metrics ``chord`` and ``geodesic`` it is at most 1.
    The paper's cosine distance is about half the square of the angle, so that a straight path of many small
    steps scores their number: volumes with different numbers of slices cannot be compared.

    Source: DALE-CT V-D and Table V; the metrics are our addition.

    Args:
        embeddings: raw CLS tokens of a volume's slices in order, ``(S, D)``; all alike give nan.
        distance: one of ``DISTANCES``.

    Raises:
        ValueError: if there are fewer than two slices, a slice's embedding is zero or not finite, or the
            distance is unknown.

    Example:
        >>> quarter = [[1, 0], [1, 1], [0, 1]]
        >>> [round(latent_continuity(quarter, distance), 4) for distance in DISTANCES]
        [1.7071, 0.9239, 1.0]
    """
    tokens = np.asarray(embeddings, np.float64)
    if tokens.ndim != 2 or len(tokens) < 2:
        raise ValueError(f"embeddings must have shape (S, D) with at least two slices, got {tokens.shape}.")
    lengths = np.linalg.norm(tokens, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        bad = int(np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))[0])
        raise ValueError(
            f"embeddings must be finite and not zero, got slice {bad} of length {lengths[bad, 0]}."
        )
    if distance not in DISTANCES:
        raise ValueError(f"distance must be one of {sorted(DISTANCES)}, got '{distance}'.")
    unit = tokens / lengths
    path = DISTANCES[distance](unit[:-1], unit[1:]).sum()
    return float(DISTANCES[distance](unit[0], unit[-1]) / path) if path > 0 else float("nan")


def matched_slices(z_mm: ArrayLike, step_mm: float) -> NDArray[np.intp]:
    """Choose slices about ``step_mm`` apart, each at most once, so that volumes of any spacing compare.

    They are the nearest to positions counted from the first slice. A coarser volume keeps all its slices.
    Positions ``(S,)`` and the indices returned are ascending.

    Raises:
        ValueError: if the step is not positive.

    Example:
        >>> matched_slices([0, 1, 2, 3, 4, 5, 6], 2.5).tolist()
        [0, 2, 5]
    """
    if not step_mm > 0:
        raise ValueError(f"step_mm must be positive, got {step_mm}.")
    place = np.asarray(z_mm, np.float64)
    wanted = np.arange(place[0], place[-1] + 1e-6, step_mm)
    after = np.searchsorted(place, wanted).clip(1, max(len(place) - 1, 1))
    nearest = np.where(
        wanted - place[after - 1] <= place[after.clip(max=len(place) - 1)] - wanted, after - 1, after
    )
    return np.unique(nearest.clip(max=len(place) - 1))


def gap_curve(
    embeddings: ArrayLike, z_mm: ArrayLike, gaps_mm: Sequence[float], distance: str = "cosine"
) -> FloatArray:
    """Return the mean distance between slices of a volume that lie each gap apart.

    Each slice is paired with the one nearest to the gap above it, if that is off by less than half the
    smallest step between gaps (0 included), so that spacings need not divide the gaps.

    Source: DALE-CT's released world-model probes, there by number of slices.

    Args:
        embeddings: embeddings of the slices, ``(S, D)``.
        z_mm: position of each slice, ascending, ``(S,)``.
        gaps_mm: gaps, ascending.
        distance: one of ``DISTANCES``.

    Returns:
        Distances ``(K,)``; nan where no pair lies that far apart.

    Raises:
        ValueError: if the gaps do not ascend from above 0.

    Example:
        >>> gap_curve([[1, 0], [0, 1], [-1, 0]], [0, 2, 4], gaps_mm=[2, 4, 9])
        array([ 1.,  2., nan])
    """
    gaps = np.asarray(gaps_mm, np.float64)
    if gaps.ndim != 1 or len(gaps) == 0 or gaps[0] <= 0 or (np.diff(gaps) <= 0).any():
        raise ValueError(f"gaps_mm must ascend from above 0, got {list(gaps_mm)}.")
    unit, place = unit_vectors(np.asarray(embeddings, np.float64)), np.asarray(z_mm, np.float64)
    tolerance = np.diff(gaps, prepend=0).min() / 2
    curve = np.full(len(gaps), np.nan)
    for index, gap in enumerate(gaps):
        partner = np.abs(place[None] - place[:, None] - gap)
        nearest = partner.argmin(1)
        close = partner.min(1) < tolerance
        if close.any():
            curve[index] = DISTANCES[distance](unit[close], unit[nearest[close]]).mean()
    return curve


def order_by_principal_axis(embeddings: ArrayLike) -> NDArray[np.intp]:
    """Order slices ``(S, D)`` along the first principal axis of their embeddings, from either end."""
    tokens, shuffled = _shuffled(embeddings)
    centred = tokens - tokens.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return shuffled[np.argsort(centred @ axes[0], kind="stable")]


def order_by_nearest_neighbours(embeddings: ArrayLike) -> NDArray[np.intp]:
    """Order slices ``(S, D)`` along a path that always goes to the nearest slice not yet visited, by cosine.

    It starts where the mean distance to all others is largest: at an end, if there is one.

    Source: DALE-CT's released world-model probes; the start is our choice.
    """
    tokens, shuffled = _shuffled(embeddings)
    unit = unit_vectors(tokens)
    near = unit @ unit.T
    order = [int(near.sum(1).argmin())]
    free = np.ones(len(tokens), bool)
    free[order[0]] = False
    for _ in range(len(tokens) - 1):
        order.append(int(np.where(free, near[order[-1]], -np.inf).argmax()))
        free[order[-1]] = False
    return shuffled[order]


def agreement(order: ArrayLike) -> float:
    """Return |Kendall's tau| between an order and the true one: 1 if they agree or are reversed, 0 by chance.

    The order is of two slices or more, numbered by their true place, ``(S,)``.

    Raises:
        ValueError: if a slice is missing or there twice.
    """
    places = np.asarray(order)
    if places.ndim != 1 or len(places) < 2 or (np.sort(places) != np.arange(len(places))).any():
        raise ValueError(f"order must hold each of at least two slices once, got {places.tolist()[:8]}.")
    return float(abs(kendalltau(places, np.arange(len(places))).statistic))


def unit_vectors(vectors: FloatArray) -> FloatArray:
    """Divide vectors ``(..., D)`` by their lengths; one of length 0 stays."""
    lengths: FloatArray = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths.clip(min=1e-300)


def _shuffled(embeddings: ArrayLike) -> tuple[FloatArray, NDArray[np.intp]]:
    """Slices in random order: a tie goes to the first, which must not be the right one by its place."""
    tokens = np.asarray(embeddings, np.float64)
    shuffled = np.random.default_rng(0).permutation(len(tokens))
    return tokens[shuffled], shuffled
