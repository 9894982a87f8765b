"""The bridge from a bag of embeddings to a language model: tokens of any number become a few soft words."""

# B bags, S tokens of a bag (slices, or cells of a grid), D embedding, W width of the bridge, Q queries,
# Z zones, L width of the language model

import math

import torch
from torch import nn
from torch.nn import functional

from common.networks.mil_probe import Standardizer

BRIDGES = ("zones", "perceiver")


class Bridge(nn.Module):
    """Compress a bag of embeddings to Q tokens as wide as the words of a language model.

    Learned queries read the bag by cross-attention, layer by layer, each followed by a perceptron; a last
    linear layer projects them. Each token of the bag carries its place, (s + 1/2) / S, as sines and cosines.
    With "zones" each query sees the tokens of one Z-th of the bag's length alone, feet first: where in the
    body a soft word comes from is then known. With "perceiver" all queries see all tokens.

    Source: zones: Ker-VLJEPA-3B (arXiv:2603.23308), whose queries each see one zone of the scan; perceiver:
    Perceiver (arXiv:2103.03206) without its attention among queries. Our choice: pre-norm, standardized
    tokens, the places of ``TransformerPool``, Q / Z queries for each zone, and that a token that lies in two
    zones is seen by both.

    Args:
        standardizer: gives each dimension of the training tokens mean 0 and deviation 1; states D, and
            embeddings of another width are refused.
        lm_dim: L.
        kind: one of ``BRIDGES``.
        num_tokens: Q.
        num_zones: Z, a divisor of Q; not used by "perceiver".
        width: W, a multiple of twice the number of heads.
        num_layers: layers of cross-attention.
        num_heads: attention heads.

    Raises:
        ValueError: if the kind is unknown or numbers do not fit each other.

    Shape:
        ``bags (B, S, D)``, ``mask (B, S)`` bool, True where there is a token. Output: ``(B, Q, L)``.
    """

    wave_numbers: torch.Tensor

    def __init__(
        self,
        *,
        standardizer: Standardizer,
        lm_dim: int,
        kind: str,
        num_tokens: int,
        num_zones: int,
        width: int,
        num_layers: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        if kind not in BRIDGES:
            raise ValueError(f"bridge must be one of {BRIDGES}, got '{kind}'.")
        if num_zones < 1 or num_tokens < 1 or num_tokens % num_zones:
            raise ValueError(f"num_tokens must be a multiple of num_zones, got {num_tokens} and {num_zones}.")
        if width % (2 * num_heads):
            raise ValueError(f"bridge_width must be a multiple of 2 x {num_heads} heads, got {width}.")
        self.dim, self.kind = len(standardizer.mean), kind
        self.num_zones, self.num_heads = num_zones, num_heads
        self.entry = nn.Sequential(standardizer, nn.Linear(self.dim, width))
        self.queries = nn.Parameter(torch.randn(num_tokens, width) / math.sqrt(width))
        self.layers = nn.ModuleList(_CrossAttention(width, num_heads) for _ in range(num_layers))
        self.exit = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, lm_dim))
        wave_numbers = 2 * math.pi * torch.logspace(5, -2, width // 2, base=2)
        self.register_buffer("wave_numbers", wave_numbers, persistent=False)

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compress; see the class."""
        if bags.shape[-1] != self.dim:
            raise ValueError(f"embeddings must be {self.dim} wide, as this bridge is, got {bags.shape[-1]}.")
        tokens, seen = self._tokens(bags, mask), self.visible(mask)[:, None]
        queries = self.queries.expand(len(bags), -1, -1)
        for layer in self.layers:
            queries = layer(queries, tokens, seen)
        words: torch.Tensor = self.exit(queries)
        return words

    def visible(self, mask: torch.Tensor) -> torch.Tensor:
        """Return which tokens each query sees, bool ``(B, Q, S)``."""
        num_queries = len(self.queries)
        if self.kind == "perceiver":
            return mask[:, None].expand(-1, num_queries, -1)
        count = mask.sum(1)[:, None, None]  # (B, 1, 1)
        token = torch.arange(mask.shape[1], device=mask.device)  # (S,)
        zone = torch.arange(num_queries, device=mask.device)[:, None] * self.num_zones // num_queries
        # token s spans s/S to (s+1)/S of the bag, zone z spans z/Z to (z+1)/Z; no zone is empty
        overlap = (token * self.num_zones < (zone + 1) * count) & (
            (token + 1) * self.num_zones > zone * count
        )
        return overlap & mask[:, None]

    def _tokens(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        place = (torch.arange(bags.shape[1], device=bags.device) + 0.5) / mask.sum(1, keepdim=True)
        angles = place[..., None] * self.wave_numbers
        tokens: torch.Tensor = self.entry(bags.to(self.queries.dtype))
        return tokens + torch.cat([angles.sin(), angles.cos()], dim=-1)

    @torch.no_grad()
    def token_weights(self, bag: torch.Tensor) -> torch.Tensor:
        """Return the share ``(S,)`` of each token of one bag ``(S, D)`` in the last layer's attention.

        It is the mean over queries and heads, and adds up to 1.
        """
        mask = torch.ones(1, len(bag), dtype=torch.bool, device=bag.device)
        tokens, seen, queries = self._tokens(bag[None], mask), self.visible(mask)[:, None], self.queries[None]
        weights = tokens.new_empty(0)
        for layer in self.layers:
            assert isinstance(layer, _CrossAttention)
            weights = layer.attention(queries, tokens, seen)
            queries = layer(queries, tokens, seen)
        return weights.mean((0, 1, 2))


class _CrossAttention(nn.Module):
    """Queries read tokens, then think: pre-norm attention and perceptron, each added to what was there."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries, self.norm_tokens, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.to_query, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_key_value = nn.Linear(width, 2 * width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self._heads(queries, tokens)
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        queries = queries + self.to_out(read.transpose(1, 2).flatten(2))
        thought: torch.Tensor = self.think(self.norm(queries))
        return queries + thought

    def attention(self, queries: torch.Tensor, tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return the weights of the attention, ``(B, heads, Q, S)``."""
        query, key, _ = self._heads(queries, tokens)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return scores.masked_fill(~seen, -math.inf).softmax(-1)

    def _heads(self, queries: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        query = self.to_query(self.norm_queries(queries))
        key, value = self.to_key_value(self.norm_tokens(tokens)).chunk(2, dim=-1)
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]


class GatedReader(nn.Module):
    """Words of a report read the soft words, between two layers of a language model; at first to no effect.

    Source: Flamingo (arXiv:2204.14198), the gate tanh(a) with a = 0 at first. Our choice: one gate for
    attention and perceptron together.

    Args:
        width: L, a multiple of the number of heads.
        num_heads: attention heads.

    Shape:
        ``words (B, T, L)``, ``soft (B, Q, L)``, ``seen (T, Q)`` bool or None for all. Output: as the words,
        in their number type.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"A language model {width} wide cannot be read by {num_heads} bridge_heads.")
        self.read = _CrossAttention(width, num_heads)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, words: torch.Tensor, soft: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read; see the class."""
        entered = words.float()  # small gates vanish in 16 bits
        return words + (self.gate.tanh() * (self.read(entered, soft, seen) - entered)).to(words.dtype)
