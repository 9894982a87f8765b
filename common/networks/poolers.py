"""The five poolings of the MIL probe: from the slices of a volume to one embedding."""

# B bags (volumes), S slices (padded), D embedding, Q queries

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn


class MeanPool(nn.Module):
    """Average the slices of each bag.

    Source: DALE-CT IV-B, "average".

    Shape:
        ``bags (B, S, D)``, ``mask (B, S)`` bool, True where there is a slice. Output: ``(B, D)``.
        What stands in the padding never matters.

    Raises:
        ValueError: if the mask has another shape than the bags, or a bag is empty.

    Example:
        >>> MeanPool()(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the class."""
        return _masked(bags, mask).sum(1) / mask.sum(1, keepdim=True)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the share of each slice ``(S,)`` of a bag ``(S, D)``: all the same."""
        return bag.new_full((len(bag),), 1 / len(bag))


class MaxPool(nn.Module):
    """Take the largest value of each embedding dimension over the slices of a bag.

    Source: DALE-CT IV-B, "max".

    Shape:
        As :class:`MeanPool`.

    Raises:
        ValueError: if the mask has another shape than the bags, or a bag is empty.

    Example:
        >>> MaxPool()(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[3.]])
    """

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the class."""
        return _masked(bags, mask, fill=-math.inf).amax(1)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the share ``(S,)`` of the dimensions whose largest value each slice of ``(S, D)`` has."""
        return torch.bincount(bag.argmax(0), minlength=len(bag)).to(bag.dtype) / bag.shape[1]


class LearnedQueryAttentionPool(nn.Module):
    """Average the slices with weights softmax(q x / sqrt(D)), where the query q is learned.

    With several queries their outputs are averaged. There are no key, value or output projections.

    Source: DALE-CT IV-B, "learned attention" (one query) and "multi-learned attention" (four).

    Args:
        dim: D, width of the embeddings.
        num_queries: Q, learned queries; drawn from N(0, 1/D) as in the authors' probe.

    Shape:
        As :class:`MeanPool`.

    Raises:
        ValueError: if there is no query, the mask has another shape than the bags, or a bag is empty.

    Example:
        >>> pool = LearnedQueryAttentionPool(dim=2, num_queries=4)
        >>> pool(torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)).tolist()
        [[1.0, 1.0]]
    """

    def __init__(self, dim: int, num_queries: int) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries must be at least 1, got {num_queries}.")
        self.queries = nn.Parameter(torch.randn(num_queries, dim) / math.sqrt(dim))

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the class."""
        return _attend(self.queries.expand(len(bags), -1, -1), bags, mask).mean(1)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the attention ``(S,)`` on each slice of a bag ``(S, D)``, the mean over the queries."""
        return _attention(self.queries[None], bag[None]).mean(1)[0]


class MeanQueryAttentionPool(nn.Module):
    """Average the slices with weights softmax(q x / sqrt(D)), where q is the mean slice of the bag.

    Source: DALE-CT IV-B, "average attention".

    Shape:
        As :class:`MeanPool`.

    Raises:
        ValueError: if the mask has another shape than the bags, or a bag is empty.
    """

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the class."""
        mean = _masked(bags, mask).sum(1) / mask.sum(1, keepdim=True)
        return _attend(mean[:, None], bags, mask)[:, 0]

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the attention ``(S,)`` on each slice of a bag ``(S, D)``."""
        return _attention(bag.mean(0)[None, None], bag[None])[0, 0]


POOLERS: dict[str, Callable[[int], nn.Module]] = {
    "average": lambda dim: MeanPool(),
    "max": lambda dim: MaxPool(),
    "learned_attention": lambda dim: LearnedQueryAttentionPool(dim, num_queries=1),
    "average_attention": lambda dim: MeanQueryAttentionPool(),
    "multi_learned_attention": lambda dim: LearnedQueryAttentionPool(dim, num_queries=4),
}


def build_pooler(name: str, dim: int) -> nn.Module:
    """Make a pooler by the paper's name for it.

    Args:
        name: key of ``POOLERS``.
        dim: width of the embeddings.

    Raises:
        ValueError: if there is no such pooler.

    Example:
        >>> build_pooler("average", dim=1024)
        MeanPool()
    """
    if name not in POOLERS:
        raise ValueError(f"pooler must be one of {list(POOLERS)}, got {name!r}.")
    return POOLERS[name](dim)


def segment_softmax(scores: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Take the softmax within each bag of packed slices.

    Args:
        scores: of the slices of all bags, one bag after the other.
        lengths: slices of each bag.

    Shape:
        scores ``(Q, T)`` with T the sum of the lengths. Output: the same.

    Example:
        >>> segment_softmax(torch.zeros(1, 3), [1, 2])
        tensor([[1.0000, 0.5000, 0.5000]])
    """
    if len(lengths) == 1:
        return scores.softmax(1)
    # the scores are small beside the slices: only they are padded, and no sum depends on the order of threads
    longest = max(lengths)
    place = torch.cat([torch.arange(length) + bag * longest for bag, length in enumerate(lengths)])
    place = place.to(scores.device, non_blocking=True)
    padded = scores.new_full((len(scores), len(lengths) * longest), -math.inf).index_copy(1, place, scores)
    return padded.unflatten(1, (len(lengths), longest)).softmax(-1).flatten(1).index_select(1, place)


def _masked(bags: torch.Tensor, mask: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    if mask.shape != bags.shape[:2]:
        raise ValueError(f"mask must have shape (B, S) = {tuple(bags.shape[:2])}, got {tuple(mask.shape)}.")
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"bags must hold at least one slice, got 0 for bag {empty[0]} of the batch.")
    return bags if bool(mask.all()) else bags.masked_fill(~mask[..., None], fill)


def _attend(queries: torch.Tensor, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention output (B, Q, D) of queries (B, Q, D) over the slices."""
    slices = _masked(bags, mask)
    return torch.einsum("bqs,bsd->bqd", _attention(queries, slices, mask), slices)


def _attention(queries: torch.Tensor, slices: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention (B, Q, S) of queries (B, Q, D) on slices (B, S, D)."""
    scores = torch.einsum("bqd,bsd->bqs", queries, slices) / math.sqrt(slices.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask[:, None], -math.inf)).softmax(-1)
