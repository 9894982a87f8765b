"""Linear probes of tokens: CLS and patch, every task and every learning rate as one network."""

# L learning rates, K = 2 kinds of tokens (CLS, patch), B rows of a batch, D embedding, C classes of all tasks

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from common.run.process import atomic_file


class DenseProbes(nn.Module):
    """One linear layer for each kind of token, task and learning rate, trained side by side.

    They share no parameter: the gradient of the sum of their losses is each one's own, and each follows the
    course it would take alone. What they share is the reading of the features, and one product with them.

    The initial weights of a probe depend on the seed alone, so that learning rates compare.

    Source: DALE-CT IV-A3.

    Args:
        tasks: name to number of classes.
        learning_rates: peak learning rates; one parameter group for each.
        dim: D, width of the embeddings.
        seed: seed of the initial weights.

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
        self, tasks: Mapping[str, int], learning_rates: Sequence[float], dim: int, seed: int
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
        self.weights = nn.ParameterList(weight.clone() for _ in learning_rates)
        self.biases = nn.ParameterList(bias.clone() for _ in learning_rates)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one optimizer group for each learning rate."""
        return [
            {"params": [weight, bias], "lr": learning_rate}
            for weight, bias, learning_rate in zip(
                self.weights, self.biases, self.learning_rates, strict=True
            )
        ]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Classify with every probe; see the class."""
        weight, bias = torch.stack(list(self.weights), dim=1), torch.stack(list(self.biases), dim=1)
        logits = tokens.to(weight.dtype) @ weight.flatten(1, 2).mT
        return logits.unflatten(2, weight.shape[1:3]).transpose(1, 2) + bias[:, :, None]

    def layer(self, kind: int, rate: int, columns: slice) -> nn.Linear:
        """Return a copy of one probe that works alone.

        Args:
            kind: 0 for CLS tokens, 1 for patch tokens.
            rate: place in ``learning_rates``.
            columns: of ``self.columns``.
        """
        weight, bias = self.weights[rate][kind, columns], self.biases[rate][kind, columns]
        layer = nn.Linear(self.dim, len(bias)).to(weight)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return layer


def save_dense_probe(
    folder: str | Path, kind: str, task: str, layer: nn.Linear, card: dict[str, Any]
) -> None:
    """Write a probe as ``<kind>_<task>.safetensors`` and ``.json``, each appearing only when whole.

    Args:
        folder: where to write.
        kind: "cls" or "patch".
        task: name of the task.
        layer: trained probe.
        card: what the weights only make sense with, JSON values; ``class_names`` and ``encoder`` are needed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
    with atomic_file(folder / f"{kind}_{task}.safetensors") as file:
        file.write(save(tensors))
    with atomic_file(folder / f"{kind}_{task}.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(card, indent=2, allow_nan=False) + "\n")


def load_dense_probe(folder: str | Path, kind: str, task: str) -> tuple[nn.Linear, dict[str, Any]]:
    """Read a probe of :func:`save_dense_probe`.

    Args:
        folder: folder of the probes.
        kind: "cls" or "patch".
        task: name of the task.

    Returns:
        The probe, and its card.

    Raises:
        FileNotFoundError: if one of the two files does not exist.
    """
    path = Path(folder) / f"{kind}_{task}"
    for suffix in (".safetensors", ".json"):
        if not path.with_name(path.name + suffix).is_file():
            raise FileNotFoundError(
                f"probes must be a folder with '{path.name}{suffix}', got '{folder}'. Run eval_dense_2d."
            )
    tensors = load_file(path.with_name(path.name + ".safetensors"))
    num_classes, dim = tensors["weight"].shape
    layer = nn.Linear(dim, num_classes)
    layer.load_state_dict(tensors)
    return layer, json.loads(path.with_name(path.name + ".json").read_text())
