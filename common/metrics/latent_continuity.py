"""How direct the path of a volume's embeddings is from its first slice to its last."""

# S slices, D embedding

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
"""Distances of unit vectors. The paper's is ``cosine``, which is no metric: a score of it may pass 1."""


def latent_continuity(embeddings: ArrayLike, distance: str = "cosine") -> float:
    """Return the distance between the first and the last slice over the sum of those between neighbours.

    The straighter the path, the larger the score. For the metrics ``chord`` and ``geodesic`` it is at most 1.
    The paper's cosine distance is about half the square of the angle, so that a straight path of many small
    steps scores their number: volumes with different numbers of slices cannot be compared.

    Source: DALE-CT V-D and Table V; the metrics are our addition.

    Args:
        embeddings: raw CLS tokens of a volume's slices in order.
        distance: one of ``DISTANCES``.

    Shape:
        Input ``(S, D)``. Output: a float, nan if no slice differs from its neighbour.

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
        raise ValueError(f"embeddings must have shape (S, D) of at least two slices, got {tokens.shape}.")
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
