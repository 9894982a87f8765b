"""A linear probe that learns beside the encoder and shows what its CLS tokens know, without touching it."""

# N slabs between two records, C labels, D embedding

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.nn import functional

from common.metrics.multilabel import auroc, macro
from common.run.distributed import sum_over_ranks


class OnlineProbe:
    """Predict a volume's labels from the CLS tokens of its slab's global views, detached.

    Each batch is scored before the probe learns from it, so that the scores are of slabs it has not been
    trained on; other slabs of their volumes it may have been. ``engine.state.metrics`` gets
    ``online_probe_auroc``, macro over the labels that occur with both values since the last record, of this
    rank's slabs.

    Source: our choice, for watching; no number of the paper.

    Args:
        embed_dim: D.
        class_names: labels of the volumes.
        log_every: iterations between two records.
        lr: learning rate of Adam.
        device: device of this rank.
    """

    def __init__(
        self, embed_dim: int, class_names: Sequence[str], log_every: int, lr: float, device: torch.device
    ) -> None:
        self.log_every = log_every
        self.class_names = list(class_names)
        self.probe = nn.Linear(embed_dim, len(class_names)).to(device)
        nn.init.zeros_(self.probe.weight)
        nn.init.zeros_(self.probe.bias)
        self.optimizer = torch.optim.Adam(self.probe.parameters(), lr=lr)
        self.scores: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """Register with an engine that keeps ``state.cls`` (B, Vg, D) and ``state.batch["labels"]``."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._learn)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.log_every), self._record)

    def state_dict(self) -> dict[str, Any]:
        """Return probe and optimizer."""
        return {"probe": self.probe.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore probe and optimizer."""
        self.probe.load_state_dict(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _learn(self, engine: Engine) -> None:
        state: Any = engine.state
        labels = state.batch["labels"].to(state.cls.device, non_blocking=True)
        logits = self.probe(state.cls.float().mean(1))
        self.scores.append(logits.detach())
        self.labels.append(labels)
        known = (labels >= 0).float()
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.clamp(min=0).float(), reduction="none"
        )
        loss = (losses * known).sum() / sum_over_ranks(known.sum()).clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        if idist.get_world_size() > 1:
            for parameter in self.probe.parameters():
                parameter.grad = sum_over_ranks(parameter.grad)  # type: ignore[arg-type]
        self.optimizer.step()

    def _record(self, engine: Engine) -> None:
        scores = torch.cat(self.scores).double().cpu().numpy()
        labels = torch.cat(self.labels).cpu().numpy()
        self.scores, self.labels = [], []
        known = (labels >= 0).all(1)
        if not known.any():  # no volume whose labels are all known since the last record
            return
        values = auroc(scores[known], labels[known])
        engine.state.metrics["online_probe_auroc"], _ = macro(values, self.class_names)
