"""Heads beside the paper's five poolers: gated attention, and a small transformer over the sequence."""

# B bags, S slices (padded), D embedding, C classes, W width of the transformer, L * K heads of the grid

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from common.embeddings.bag_batches import pad_bags

WAVELENGTHS_MM = (16.0, 2000.0)
"""Shortest and longest wave of the position code: a few slices, and more than a trunk (our choice)."""


class GatedAttentionHead(nn.Module):
    """Weigh the slices by softmax(w . (tanh(V x) * sigmoid(U x))), average them, and classify linearly.

    Source: Attention-based deep multiple instance learning (arXiv:1802.04712), equation 9 (gated ABMIL), with
    its 128 hidden units.

    Args:
        dim: D, width of the embeddings.
        num_classes: C.
        hidden_dim: units of the attention.

    Shape:
        ``bags (B, S, D + 1)``, the last column the slice's position in mm, which this head leaves alone;
        ``mask (B, S)`` bool, True where there is a slice. Output: logits ``(B, C)``.
    """

    def __init__(self, dim: int, num_classes: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden_dim)
        self.gate = nn.Linear(dim, hidden_dim)
        self.score = nn.Linear(hidden_dim, 1)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Classify; see the class."""
        slices = bags[..., :-1].to(self.classifier.weight.dtype)
        hidden = self.value(slices).tanh() * self.gate(slices).sigmoid()
        attention = self.score(hidden)[..., 0].masked_fill(~mask, -math.inf).softmax(1)
        return self.classifier(torch.einsum("bs,bsd->bd", attention, slices))


class TransformerHead(nn.Module):
    """Let the slices attend to each other, each knowing its place in mm, then average them and classify.

    Source: our choice: 2 pre-norm layers of width 256 with 4 heads, sines and cosines of the position.

    Args:
        dim: D, width of the embeddings.
        num_classes: C.
        width: W, a multiple of twice the number of heads.
        num_layers: transformer layers.
        num_heads: attention heads.

    Shape:
        As :class:`GatedAttentionHead`.
    """

    wave_numbers: torch.Tensor

    def __init__(
        self, dim: int, num_classes: int, width: int = 256, num_layers: int = 2, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.entry = nn.Linear(dim, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes)
        shortest, longest = WAVELENGTHS_MM
        powers = torch.linspace(0, 1, width // 2, dtype=torch.float64)
        wave_numbers = 2 * math.pi / (shortest * (longest / shortest) ** powers)
        self.register_buffer("wave_numbers", wave_numbers.float(), persistent=False)

    def forward(self, bags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Classify; see the class."""
        values = bags.to(self.classifier.weight.dtype)
        angles = values[..., -1:] * self.wave_numbers
        slices = self.entry(values[..., :-1]) + torch.cat([angles.sin(), angles.cos()], dim=-1)
        for layer in self.layers:
            slices = layer(slices, src_key_padding_mask=~mask)
        total = self.norm(slices).masked_fill(~mask[..., None], 0).sum(1)
        return self.classifier(total / mask.sum(1, keepdim=True))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "gated_abmil": GatedAttentionHead,
    "transformer": TransformerHead,
}


class SequenceGrid(nn.Module):
    """One head for each pair of a learning rate and a kind, side by side on the same batches.

    Takes the place of :class:`common.networks.mil_probe.ProbeGrid` in its trainer, which then reports these
    heads beside the paper's poolers and never chooses between the two. No head shares a parameter with
    another; initial weights depend on the seed and the kind only.

    Args:
        poolers: kinds, keys of ``HEADS``.
        learning_rates: peak learning rates; one parameter group for each.
        dim: D, width of the embeddings without the position.
        num_classes: C.
        seed: seed of the initial weights.

    Shape:
        ``fixed`` is not looked at; ``bags`` B tensors ``(S, D + 1)`` of :class:`PositionedBags`. Output:
        logits ``(L * K, B, C)``, head ``l * K + k`` having learning rate l and kind k.

    Raises:
        ValueError: if a kind is unknown, or a kind or a learning rate is given twice or not at all.
    """

    def __init__(
        self, poolers: Sequence[str], learning_rates: Sequence[float], dim: int, num_classes: int, seed: int
    ) -> None:
        super().__init__()
        for name, values in (("poolers", poolers), ("learning_rates", learning_rates)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be given, each once, got {list(values)}.")
        unknown = [name for name in poolers if name not in HEADS]
        if unknown:
            raise ValueError(f"poolers must be of {list(HEADS)}, got '{unknown[0]}'.")
        self.dim, self.num_classes, self.seed = dim, num_classes, seed
        self.names = [(pooler, rate) for rate in learning_rates for pooler in poolers]
        self.learning_rates = list(learning_rates)
        self.heads = nn.ModuleList(self._initial(kind) for kind, _ in self.names)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one optimizer group for each learning rate."""
        heads = list(zip(self.names, self.heads, strict=True))
        return [
            {"params": [p for (_, own), head in heads if own == rate for p in head.parameters()], "lr": rate}
            for rate in self.learning_rates
        ]

    def fixed_features(self, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return an empty row a volume: no head has a part without parameters."""
        return torch.empty(len(bags), 0, self.dim, device=bags[0].device)

    def forward(self, fixed: torch.Tensor, bags: Sequence[torch.Tensor]) -> torch.Tensor:
        """Classify with every head; see the class."""
        padded, mask = pad_bags(bags)
        return torch.stack([head(padded, mask) for head in self.heads])

    def probe(self, index: int) -> nn.Module:
        """Return a copy of one head that works alone.

        Args:
            index: place in ``names``.
        """
        head = self._initial(self.names[index][0])
        head.load_state_dict(self.heads[index].state_dict())
        return head.to(next(self.heads[index].parameters()))

    def _initial(self, kind: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return HEADS[kind](self.dim, self.num_classes)
