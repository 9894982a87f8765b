"""Nearest neighbours by cosine: what they say about a volume's labels, and how well they retrieve its like.

The search is scikit-learn's exact one. An index such as faiss gains nothing here: CT-RATE's 3,000 queries
against 47,000 volumes are 0.3 TFLOP at 1,024 dimensions, seconds on one processor core.
"""

# Q queries, N volumes of the bank, D embedding, C classes, k neighbours

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.neighbors import NearestNeighbors

from common.metrics.multilabel import ratio

FloatArray = NDArray[np.float64]

WEIGHTS = ("majority", "distance")
MIN_DISTANCE = 1e-9  # of a query that equals a volume of the bank, so that it outweighs all others


class Neighbours(NamedTuple):
    """The k volumes nearest to each query, the nearest first: both ``(Q, k)``."""

    places: NDArray[np.int64]  # rows of the bank
    distances: FloatArray  # cosine distances


def cosine_neighbours(queries: NDArray[Any], bank: NDArray[Any], k: int) -> Neighbours:
    """Find the k volumes of the bank ``(N, D)`` with the smallest cosine distance to each query ``(Q, D)``.

    Raises:
        ValueError: if widths differ, k is not in [1, N], or an embedding has length 0 or is not finite.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries and bank must have one width, got shapes {queries.shape} and {bank.shape}."
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be at least 1 and at most {len(bank)}, the volumes of the bank, got {k}.")
    for name, embeddings in (("queries", queries), ("bank", bank)):
        lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
        if len(bad):
            raise ValueError(
                f"{name} must have a finite length above 0, got {lengths[bad[0]]} in row {bad[0]}."
            )
    distances, places = NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank).kneighbors(queries)
    return Neighbours(places, distances.astype(np.float64))


def knn_scores(neighbours: Neighbours, labels: ArrayLike, weights: str) -> FloatArray:
    """Score each class of each query by its share of the neighbours, ``(Q, C)`` in [0, 1].

    It is apart from the search, so that one search serves every k and weighting.

    Source: equals ``sklearn.neighbors.KNeighborsClassifier(metric="cosine").predict_proba`` of each class.

    Args:
        neighbours: neighbours of the queries in the bank.
        labels: labels of the bank, 0 or 1, ``(N, C)``.
        weights: "majority": every neighbour counts the same; "distance": by one over its cosine distance.

    Raises:
        ValueError: if the weights are neither of the two.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got '{weights}'.")
    distances = np.maximum(neighbours.distances, MIN_DISTANCE)
    weight = 1 / distances if weights == "distance" else np.ones_like(distances)
    # the total is one more column of the same sum, so that a class which all neighbours have scores exactly 1
    counted = np.pad(np.asarray(labels, dtype=np.float64), ((0, 0), (0, 1)), constant_values=1.0)
    sums: FloatArray = np.einsum("qk,qkc->qc", weight, counted[neighbours.places])
    return sums[:, :-1] / sums[:, -1:]


def retrieval_report(
    neighbours: Neighbours,
    *,
    query_labels: ArrayLike,
    bank_labels: ArrayLike,
    names: Sequence[str],
    ks: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Measure how well a volume with a finding retrieves others that have it.

    For each class, over the queries that have it: ``precision_at_<k>``, the share of the first k volumes that
    have it too; ``recall_at_<k>``, the share of all volumes of the bank with the class that are among the
    first k; ``hit_at_<k>``, the share of queries with at least one among the first k; and ``prevalence``, the
    share of the bank that has the class, which is the precision of chance. They are nan for a class that no
    query has, and recall also for one that no volume of the bank has.

    Labels are 0 or 1, ``(Q, C)`` and ``(N, C)``; the report maps class to metric to value.

    Raises:
        ValueError: if a k is larger than the number of neighbours that were found.
    """
    most = neighbours.places.shape[1]
    if not ks or min(ks) < 1 or max(ks) > most:
        raise ValueError(f"ks must be from 1 to {most}, the neighbours found, got {list(ks)}.")
    query, bank = np.asarray(query_labels, dtype=np.float64), np.asarray(bank_labels, dtype=np.float64)
    num_queries, num_in_bank = query.sum(0), bank.sum(0)
    found = bank[neighbours.places].cumsum(1)  # (Q, k, C): volumes with the class among the first k
    columns: dict[str, FloatArray] = {"prevalence": num_in_bank / len(bank)}
    columns["prevalence"][num_queries == 0] = np.nan
    for k in ks:
        hits = found[:, k - 1]
        columns[f"precision_at_{k}"] = ratio((query * hits).sum(0), k * num_queries)
        columns[f"recall_at_{k}"] = ratio((query * hits).sum(0), num_in_bank * num_queries)
        columns[f"hit_at_{k}"] = ratio((query * (hits > 0)).sum(0), num_queries)
    return {
        name: {metric: float(values[c]) for metric, values in columns.items()} for c, name in enumerate(names)
    }
