"""How well the order of a volume's slices can be recovered from their embeddings, without any label."""

# S slices, D embedding

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau

FloatArray = NDArray[np.float64]


def _shuffled(num_slices: int) -> NDArray[np.intp]:
    """Return slices in random order: ties go to the first, which must not be the right one by its place."""
    return np.random.default_rng(0).permutation(num_slices)


def order_by_principal_axis(embeddings: ArrayLike) -> NDArray[np.intp]:
    """Order slices by their place along the first principal axis of the volume's embeddings.

    Args:
        embeddings: embeddings of the slices.

    Shape:
        ``(S, D)``. Output: ``(S,)``, the slices in order; one end is as good as the other.

    Example:
        >>> sorted([order_by_principal_axis([[0, 0], [4, 1], [2, 0]]).tolist()[i] for i in (0, -1)])
        [0, 1]
    """
    tokens = np.asarray(embeddings, np.float64)
    shuffled = _shuffled(len(tokens))
    tokens = tokens[shuffled]
    centred = tokens - tokens.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return shuffled[np.argsort(centred @ axes[0], kind="stable")]


def order_by_nearest_neighbours(embeddings: ArrayLike) -> NDArray[np.intp]:
    """Order slices along a path that always goes to the nearest slice not yet visited, by cosine distance.

    It starts where the mean distance to all others is largest: at an end, if there is one.

    Source: DALE-CT's released world-model probes; the start is our choice.

    Args:
        embeddings: embeddings of the slices.

    Shape:
        ``(S, D)``. Output: ``(S,)``, the slices in order.

    Example:
        >>> order_by_nearest_neighbours([[1, 0], [0, 1], [2, 1], [1, 2]]).tolist()
        [0, 2, 3, 1]
    """
    tokens = np.asarray(embeddings, np.float64)
    shuffled = _shuffled(len(tokens))
    tokens = tokens[shuffled]
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True).clip(min=1e-300)
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

    Args:
        order: slices, numbered by their true place.

    Shape:
        ``(S,)``, at least two.

    Raises:
        ValueError: if it is not an order of slices.

    Example:
        >>> agreement([3, 2, 1, 0]), round(agreement([1, 2, 3, 0]), 9)
        (1.0, 0.0)
    """
    places = np.asarray(order)
    if places.ndim != 1 or len(places) < 2 or (np.sort(places) != np.arange(len(places))).any():
        raise ValueError(f"order must hold each of at least two slices once, got {places.tolist()[:8]}.")
    return float(abs(kendalltau(places, np.arange(len(places))).statistic))
