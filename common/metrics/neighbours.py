"""Nearest neighbours by cosine: what they say of a volume's labels, and how well they retrieve alike volumes.

Exact search, in chunks of one matrix product each. An index such as faiss buys nothing here: CT-RATE's 3,000
queries against 47,000 volumes are 0.3 TFLOP at 1,024 dimensions, seconds of one processor core.
"""

# Q queries, N volumes of the bank, D embedding, C classes, k neighbours

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

QUERIES_PER_CHUNK = 1024  # bounds the memory to 1024 x N similarities; changes no number
WEIGHTS = ("majority", "distance")
MIN_DISTANCE = 1e-9  # of a query that equals a volume of the bank, so that it outweighs all others


class Neighbours(NamedTuple):
    """The k volumes nearest to each query, the nearest first.

    Attributes:
        places: rows of the bank, ``(Q, k)`` int64.
        similarities: cosines, ``(Q, k)`` float64, falling along a row.
    """

    places: np.ndarray
    similarities: np.ndarray


def cosine_neighbours(queries: torch.Tensor, bank: torch.Tensor, k: int) -> Neighbours:
    """Find the k volumes of the bank with the largest cosine to each query.

    Args:
        queries: any floating type and device.
        bank: where to search; the device is that of the queries.
        k: neighbours of each query.

    Shape:
        ``queries (Q, D)``, ``bank (N, D)``.

    Raises:
        ValueError: if widths differ, k is not in [1, N], or an embedding has length 0 or is not finite.

    Example:
        >>> bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
        >>> cosine_neighbours(torch.tensor([[0.0, 1.0]]), bank, k=2).places
        array([[1, 2]])
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries and bank must have one width, got shapes {tuple(queries.shape)} and "
            f"{tuple(bank.shape)}."
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be at least 1 and at most {len(bank)}, the volumes of the bank, got {k}.")
    directions = _directions(bank, "bank")
    places, similarities = [], []
    for chunk in _directions(queries, "queries").split(QUERIES_PER_CHUNK):
        nearest = (chunk @ directions.mT).topk(k, dim=1)
        places.append(nearest.indices.cpu())
        similarities.append(nearest.values.double().cpu())
    return Neighbours(torch.cat(places).numpy(), torch.cat(similarities).numpy())


def knn_scores(neighbours: Neighbours, labels: np.ndarray, weights: str) -> np.ndarray:
    """Score each class of each query by its share among the neighbours.

    Source: equals ``sklearn.neighbors.KNeighborsClassifier(metric="cosine").predict_proba`` of each class.

    Args:
        neighbours: of the queries in the bank.
        labels: of the bank, 0 or 1.
        weights: "majority": every neighbour counts the same; "distance": by one over its cosine distance.

    Shape:
        ``labels (N, C)``. Output: ``(Q, C)`` float64 in [0, 1].

    Raises:
        ValueError: if the weights are neither of the two.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got '{weights}'.")
    if weights == "majority":
        weight = np.ones_like(neighbours.similarities)
    else:
        weight = 1 / np.maximum(1 - neighbours.similarities, MIN_DISTANCE)
    # the total is one column more of the same sum, so that a class which all neighbours have scores exactly 1
    counted = np.pad(np.asarray(labels, dtype=np.float64), ((0, 0), (0, 1)), constant_values=1.0)
    sums = np.einsum("qk,qkc->qc", weight, counted[neighbours.places])
    return sums[:, :-1] / sums[:, -1:]


def retrieval_report(
    neighbours: Neighbours,
    query_labels: np.ndarray,
    bank_labels: np.ndarray,
    names: Sequence[str],
    ks: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Measure how well a volume with a finding retrieves others with it.

    For each class, over the queries that have it: ``precision_at_k``, the share of the first k volumes that
    have it too; ``recall_at_k``, the share of all volumes of the bank with the class that are among the first
    k; ``hit_at_k``, the share of queries with at least one among the first k; and ``prevalence`` of the class
    in the bank, the precision of chance.

    Args:
        neighbours: of the queries in the bank.
        query_labels: 0 or 1.
        bank_labels: 0 or 1.
        names: of the classes.
        ks: how many neighbours to look at.

    Shape:
        ``query_labels (Q, C)``, ``bank_labels (N, C)``.

    Returns:
        ``report[name]["precision_at_5"]`` and so on; NaN for a class that no query has, recall also for one
        that no volume of the bank has.

    Raises:
        ValueError: if a k is larger than the number of neighbours that were found.
    """
    most = neighbours.places.shape[1]
    if not ks or min(ks) < 1 or max(ks) > most:
        raise ValueError(f"ks must be from 1 to {most}, the neighbours found, got {list(ks)}.")
    query, bank = np.asarray(query_labels, dtype=np.float64), np.asarray(bank_labels, dtype=np.float64)
    num_queries, num_in_bank = query.sum(0), bank.sum(0)
    found = bank[neighbours.places].cumsum(1)  # (Q, k, C): volumes with the class among the first k
    columns: dict[str, np.ndarray] = {"prevalence": num_in_bank / len(bank)}
    columns["prevalence"][num_queries == 0] = np.nan
    for k in ks:
        hits = found[:, k - 1]
        columns[f"precision_at_{k}"] = _ratio((query * hits).sum(0), k * num_queries)
        columns[f"recall_at_{k}"] = _ratio((query * hits).sum(0), num_in_bank * num_queries)
        columns[f"hit_at_{k}"] = _ratio((query * (hits > 0)).sum(0), num_queries)
    return {
        name: {metric: float(values[c]) for metric, values in columns.items()} for c, name in enumerate(names)
    }


def _directions(embeddings: torch.Tensor, name: str) -> torch.Tensor:
    """Scale to length 1, at least in float32."""
    wide = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    lengths = wide.norm(dim=1, keepdim=True)
    bad = (~torch.isfinite(lengths) | (lengths == 0)).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} must have embeddings of a finite length above 0, got {float(lengths[bad[0]])} for row "
            f"{bad[0]}."
        )
    return wide / lengths


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)
