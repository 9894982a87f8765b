"""Poolers of the MIL probe, from slices to one embedding per volume: the paper's five, and three more.

Each is called with ``bags (B, S, D)`` and ``mask (B, S)`` bool, True where there is a slice, and returns
``(B, D)``; what stands in the padding never matters. It raises ``ValueError`` if the mask has another shape
than the bags, or a bag is empty. ``slice_weights`` returns the share ``(S,)`` of each slice of one bag
``(S, D)`` in the result; reports show it.
"""

# B bags (volumes), S slices (padded), D embedding, Q queries, W width of the transformer

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

NUM_RADIOMICS = 3  # volume, mean HU, texture


class MeanPool(nn.Module):
    """Average the slices of each bag.

    Source: DALE-CT IV-B, "average".

    Example:
        >>> MeanPool()(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[2.]])
    """

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the module."""
        return _masked(bags, mask).sum(1) / mask.sum(1, keepdim=True)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return shares that are all the same."""
        return bag.new_full((len(bag),), 1 / len(bag))


class MaxPool(nn.Module):
    """Take the largest value of each embedding dimension over the slices of a bag.

    Source: DALE-CT IV-B, "max".

    Example:
        >>> MaxPool()(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]]))
        tensor([[3.]])
    """

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the module."""
        return _masked(bags, mask, fill=-math.inf).amax(1)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the share of the dimensions that take their value from each slice."""
        return torch.bincount(bag.argmax(0), minlength=len(bag)).to(bag.dtype) / bag.shape[1]


class LearnedQueryAttentionPool(nn.Module):
    """Average the slices with weights softmax(q x / sqrt(D)), where the query q is learned.

    With several queries their outputs are averaged. There are no key, value or output projections.

    Source: DALE-CT IV-B, "learned attention" (one query) and "multi-learned attention" (four).

    Args:
        dim: D, width of the embeddings.
        num_queries: Q, learned queries; drawn from N(0, 1/D) as in the authors' probe.

    Raises:
        ValueError: if there is no query.

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
        """Pool; see the module."""
        return _attend(self.queries.expand(len(bags), -1, -1), bags, mask).mean(1)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the attention, the mean over the queries."""
        return _attention(self.queries[None], bag[None]).mean(1)[0]


class MeanQueryAttentionPool(nn.Module):
    """Average the slices with weights softmax(q x / sqrt(D)), where q is the mean slice of the bag.

    Source: DALE-CT IV-B, "average attention".
    """

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the module."""
        mean = _masked(bags, mask).sum(1) / mask.sum(1, keepdim=True)
        return _attend(mean[:, None], bags, mask)[:, 0]

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the attention."""
        return _attention(bag.mean(0)[None, None], bag[None])[0, 0]


class GatedAttentionPool(nn.Module):
    """Average the slices with weights softmax(w . (tanh(V x) * sigmoid(U x))), all learned.

    Source: Attention-based deep multiple instance learning (arXiv:1802.04712), equation 9 (gated ABMIL), with
    its 128 hidden units.
    """

    def __init__(self, dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the module."""
        slices = _masked(bags, mask)
        attention = self._scores(slices).masked_fill(~mask, -math.inf).softmax(1)
        return torch.einsum("bs,bsd->bd", attention, slices)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the attention."""
        return self._scores(bag).softmax(0)

    def _scores(self, slices: torch.Tensor) -> torch.Tensor:
        return self.score(self.value(slices).tanh() * self.gate(slices).sigmoid())[..., 0]


class TransformerPool(nn.Module):
    """Let the slices attend to each other, each with its place between feet and head, then average them.

    The place of slice s is (s + 1/2) / S, so that volumes compare whatever their spacing; slices must be in
    order, as those of an encoder bundle are.

    Source: our choice: 2 pre-norm layers of width 256 with 4 heads; sines and cosines of the place, whose
    waves are 1/32 to 4 volumes long.

    Args:
        dim: D, width of the embeddings.
        width: W, a multiple of twice the number of heads.
        num_layers: transformer layers.
        num_heads: attention heads.
    """

    wave_numbers: torch.Tensor

    def __init__(self, dim: int, width: int = 256, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.entry = nn.Linear(dim, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, dim)
        wave_numbers = 2 * math.pi * torch.logspace(5, -2, width // 2, base=2)
        self.register_buffer("wave_numbers", wave_numbers, persistent=False)

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the module."""
        slices, count = self.entry(_masked(bags, mask)), mask.sum(1, keepdim=True)
        place = (torch.arange(bags.shape[1], device=bags.device) + 0.5) / count
        angles = place.to(slices.dtype)[..., None] * self.wave_numbers
        slices = slices + torch.cat([angles.sin(), angles.cos()], dim=-1)
        for layer in self.layers:
            slices = layer(slices, src_key_padding_mask=~mask)
        return self.exit(_masked(self.norm(slices), mask).sum(1) / count)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return shares in the last average, which are all the same."""
        return bag.new_full((len(bag),), 1 / len(bag))


class RadiomicsGatePool(GatedAttentionPool):
    """Gate each organ's token by its macro-radiomics, x * sigmoid(W r + b), then attend over organs.

    The last ``NUM_RADIOMICS`` dimensions of a bag are r, which stay beside what they gate: volume, mean HU
    and texture, see :func:`common.embeddings.organ_tokens.organ_radiomics`.

    Source: the idea of anatomically guided gating in JANUS, arXiv:2605.13813, which gates the visual features
    of a disease by numbers chosen for it; here every organ is gated by its own, and attention is that of
    :class:`GatedAttentionPool`.
    """

    def __init__(self, dim: int, hidden_dim: int = 128) -> None:
        super().__init__(dim, hidden_dim)
        self.radiomics = nn.Linear(NUM_RADIOMICS, dim - NUM_RADIOMICS)

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pool; see the module."""
        return super().forward(self._gated(_masked(bags, mask)), mask)

    def slice_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the attention on gated tokens."""
        return super().slice_weights(self._gated(bag))

    def _gated(self, bags: torch.Tensor) -> torch.Tensor:
        tokens, radiomics = bags[..., :-NUM_RADIOMICS], bags[..., -NUM_RADIOMICS:]
        return torch.cat([tokens * self.radiomics(radiomics).sigmoid(), radiomics], -1)


POOLERS: dict[str, Callable[[int], nn.Module]] = {
    "average": lambda dim: MeanPool(),
    "max": lambda dim: MaxPool(),
    "learned_attention": lambda dim: LearnedQueryAttentionPool(dim, num_queries=1),
    "average_attention": lambda dim: MeanQueryAttentionPool(),
    "multi_learned_attention": lambda dim: LearnedQueryAttentionPool(dim, num_queries=4),
    "gated_abmil": GatedAttentionPool,
    "transformer": TransformerPool,
    "radiomics_gate": RadiomicsGatePool,
}
PAPER_POOLERS = tuple(POOLERS)[:5]
"""Source: DALE-CT IV-B."""


def build_pooler(name: str, dim: int) -> nn.Module:
    """Make one of ``POOLERS`` for embeddings of width D.

    Raises:
        ValueError: if there is no such pooler, or it has no ``slice_weights``.

    Example:
        >>> build_pooler("average", dim=1024)
        MeanPool()
    """
    if name not in POOLERS:
        raise ValueError(f"pooler must be one of {list(POOLERS)}, got {name!r}.")
    pooler = POOLERS[name](dim)
    if not hasattr(pooler, "slice_weights"):  # said before training: reports need it afterwards
        raise ValueError(
            f"pooler '{name}' must have a method slice_weights(bag), got a {type(pooler).__name__} without "
            "it. Let it return the share (S,) of each slice, as that of MeanPool does."
        )
    return pooler


def pad_bags(bags: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Join bags ``(S, D)`` into one tensor ``(B, S, D)``, zero-padded at the end, and a mask ``(B, S)``.

    Raises:
        ValueError: if a bag is empty.

    Example:
        >>> pad_bags([torch.ones(1, 3), torch.ones(2, 3)])[1]
        tensor([[ True, False],
                [ True,  True]])
    """
    lengths = [len(bag) for bag in bags]
    if 0 in lengths:
        raise ValueError(f"bags must hold at least one slice, got 0 for bag {lengths.index(0)} of the batch.")
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    return padded, mask.to(padded.device, non_blocking=True)


def segment_softmax(scores: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Take the softmax within each bag of packed slices; scores ``(Q, T)``, T being the sum of the lengths.

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
    if mask.is_cuda:  # reading it would wait for the device; pad_bags has looked for empty bags
        return bags.masked_fill(~mask[..., None], fill)
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
