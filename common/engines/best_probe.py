"""Chooses the probe of a grid and the step, by validation."""

# L * K probes of the grid, N volumes, C classes

from typing import Any

import numpy as np
import torch

from common.metrics.multilabel import f1_thresholds
from common.networks.mil_probe import ProbeGrid


class BestProbe:
    """Keeps the probe and step with the highest validation macro AUPRC, with its weights and thresholds.

    Ties keep the earlier step, and within a step the probe that the grid names first.

    Attributes:
        auprc: its validation macro AUPRC; nan before the first validation.
        index: its place in ``ProbeGrid.names``.
        step: optimizer steps it was trained for.
        parameters: its state dictionary.
        thresholds: float64 ``(C,)``, per-class optimum of F1 on validation.
    """

    def __init__(self) -> None:
        self.auprc = float("nan")
        self.index = -1
        self.step = -1
        self.parameters: dict[str, torch.Tensor] = {}
        self.thresholds = torch.empty(0, dtype=torch.float64)

    def offer(
        self, auprc: np.ndarray, step: int, network: ProbeGrid, scores: np.ndarray, targets: np.ndarray
    ) -> None:
        """Keep the best probe of this validation if it beats the best so far.

        Args:
            auprc: macro AUPRC of every probe, nan for one that diverged.
            step: optimizer steps taken.
            network: grid whose weights are copied.
            scores: validation scores.
            targets: validation labels.

        Shape:
            ``auprc (L * K,)``, ``scores (L * K, N, C)``, ``targets (N, C)``.
        """
        index = int(np.nanargmax(auprc))
        if auprc[index] <= self.auprc:
            return
        self.auprc, self.index, self.step = float(auprc[index]), index, step
        self.parameters = network.probe(index).state_dict()
        self.thresholds = torch.from_numpy(
            np.asarray(f1_thresholds(scores[index], targets), dtype=np.float64)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers only."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        vars(self).update(state)
