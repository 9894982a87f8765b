"""Chooses the learning rate and the step of each linear probe, by validation."""

# L learning rates, C classes of a task

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common.embeddings.dense_cohort import TOKEN_KINDS
from common.networks.dense_probe import DenseProbes

Key = tuple[str, str]
"""Kind of token and task."""


class ChosenLayer(TypedDict):
    """A linear probe with its weights when it was chosen."""

    auprc: float  # validation macro AUPRC
    rate: int  # place among the learning rates
    step: int  # optimizer steps taken
    weight: torch.Tensor
    bias: torch.Tensor


class BestLayers:
    """Keeps the learning rate and step with the highest validation macro AUPRC, for each kind and task.

    Ties keep the earlier step, and within a step the learning rate that is named first.

    Attributes:
        chosen: kind and task to the best probe so far.
    """

    def __init__(self) -> None:
        self.chosen: dict[Key, ChosenLayer] = {}

    def offer(self, key: Key, auprc: NDArray[np.float64], step: int, network: DenseProbes) -> None:
        """Keep the best learning rate of this validation if it beats the best so far.

        Args:
            key: kind of token and task.
            auprc: macro AUPRC ``(L,)``, nan for a probe that diverged.
            step: optimizer steps taken.
            network: probes whose weights are copied.
        """
        rate = int(np.nanargmax(auprc))
        if key in self.chosen and auprc[rate] <= self.chosen[key]["auprc"]:
            return
        layer = network.layer(TOKEN_KINDS.index(key[0]), rate, network.columns[key[1]])
        self.chosen[key] = {
            "auprc": float(auprc[rate]),
            "rate": rate,
            "step": step,
            "weight": layer.weight.detach(),
            "bias": layer.bias.detach(),
        }

    def layer(self, key: Key) -> nn.Linear:
        """Return a chosen probe with the weights it had when it was chosen."""
        chosen = self.chosen[key]
        num_classes, dim = chosen["weight"].shape
        layer = nn.Linear(dim, num_classes).to(chosen["weight"])
        with torch.no_grad():
            layer.weight.copy_(chosen["weight"])
            layer.bias.copy_(chosen["bias"])
        return layer

    def state_dict(self) -> dict[str, ChosenLayer]:
        """Return tensors and plain numbers only."""
        return {"/".join(key): value for key, value in self.chosen.items()}

    def load_state_dict(self, state: dict[str, ChosenLayer]) -> None:
        """Restore what :meth:`state_dict` returned."""
        pairs = {key: key.partition("/") for key in state}
        self.chosen = {(kind, task): state[key] for key, (kind, _, task) in pairs.items()}
