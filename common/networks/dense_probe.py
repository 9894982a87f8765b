"""Linear probes of tokens: CLS and patch, every task and every learning rate as one network."""

# L learning rates, K = 2 kinds of tokens (CLS, patch), B rows of a batch, D embedding, C classes of all tasks

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import ArrayLike
from torch import nn

from common.networks.mil_probe import Standardizer, read_probe


class DenseProbes(nn.Module):
    """One linear layer for each kind of token, task and learning rate, trained side by side.

    They share no parameter: each takes the course it would take alone. What they share is the reading of the
    features, and one product with them.

    The initial weights of a probe depend on the seed alone, so that learning rates compare.

    Source: DALE-CT IV-A3.

    Args:
        tasks: name to number of classes.
        learning_rates: peak learning rates; one parameter group for each.
        dim: D, width of the embeddings.
        seed: seed of the initial weights.
        standardizers: one for each kind of token; none for tokens as they are, as in the paper.
        prior_logits: ``(K, C)``; probes start at this constant prediction, their weights at 0. None for
            PyTorch's random start, as in the paper.

    Shape:
        ``tokens (K, B, D)``: CLS tokens of B slices, and B patch tokens. Output: logits ``(K, L, B, C)``.

    Raises:
        ValueError: if there is no task, or a learning rate is given twice or not at all.

    Example:
        >>> probes = DenseProbes({"rex": 3, "ts": 4}, [0.1, 0.01], dim=5, seed=0)
        >>> probes(torch.randn(2, 6, 5)).shape
        torch.Size([2, 2, 6, 7])
    """

    def __init__(
        self,
        tasks: Mapping[str, int],
        learning_rates: Sequence[float],
        dim: int,
        seed: int,
        standardizers: Sequence[Standardizer] = (),
        prior_logits: ArrayLike | None = None,
    ) -> None:
        super().__init__()
        if not tasks or min(tasks.values()) < 1:
            raise ValueError(f"tasks must be given, each with its number of classes, got {dict(tasks)}.")
        if not learning_rates or len(set(learning_rates)) < len(learning_rates):
            raise ValueError(f"learning_rates must be given, each once, got {list(learning_rates)}.")
        self.dim, self.learning_rates = dim, list(learning_rates)
        ends = torch.tensor([0, *tasks.values()]).cumsum(0).tolist()
        self.columns = {
            task: slice(first, last) for task, first, last in zip(tasks, ends[:-1], ends[1:], strict=True)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(dim, ends[-1]) for _ in range(2)]  # CLS and patch tokens
        weight = torch.stack([layer.weight.detach() for layer in layers])
        bias = torch.stack([layer.bias.detach() for layer in layers])
        if prior_logits is not None:
            weight, bias = torch.zeros_like(weight), torch.tensor(prior_logits).to(bias)
        self.standardizers = nn.ModuleList(standardizers)
        self.weights = nn.ParameterList(weight.clone() for _ in learning_rates)
        self.biases = nn.ParameterList(bias.clone() for _ in learning_rates)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one optimizer group for each learning rate."""
        of_rates = zip(self.weights, self.biases, self.learning_rates, strict=True)
        return [{"params": [weight, bias], "lr": rate} for weight, bias, rate in of_rates]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Classify with every probe; see the class."""
        weight, bias = torch.stack(list(self.weights), dim=1), torch.stack(list(self.biases), dim=1)
        tokens = tokens.to(weight.dtype)
        if self.standardizers:
            pairs = zip(self.standardizers, tokens, strict=True)
            tokens = torch.stack([standardizer(of_kind) for standardizer, of_kind in pairs])
        logits = tokens @ weight.flatten(1, 2).mT
        return logits.unflatten(2, weight.shape[1:3]).transpose(1, 2) + bias[:, :, None]

    @torch.no_grad()
    def raw(self, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight ``(L, C, D)`` and bias ``(L, C)`` of a kind of token that read it as it is stored."""
        weight, bias = (torch.stack([p[kind] for p in of_rates]) for of_rates in (self.weights, self.biases))
        if self.standardizers:
            weight, bias = cast(Standardizer, self.standardizers[kind]).fold(weight, bias)
        return weight, bias

    def layer(self, kind: int, rate: int, columns: slice) -> nn.Linear:
        """Return a copy of one probe that works alone, on tokens as they are stored.

        ``kind`` is 0 for CLS and 1 for patch tokens, ``rate`` a place in ``learning_rates``, and ``columns``
        one of ``self.columns``.
        """
        weight, bias = (of_rates[rate, columns] for of_rates in self.raw(kind))
        layer = nn.Linear(self.dim, len(bias)).to(weight)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer


def load_dense_probe(folder: str | Path, kind: str, task: str) -> tuple[nn.Linear, dict[str, Any]]:
    """Load a probe that was saved as ``<kind>_<task>``, such as "patch_rexgroundingct", and its card.

    Raises:
        FileNotFoundError: if one of the two files does not exist.
    """
    weights, card = read_probe(folder, f"{kind}_{task}")
    num_classes, dim = weights["weight"].shape
    layer = nn.Linear(dim, num_classes)
    layer.load_state_dict(weights)
    return layer, card
