"""LeJEPA pretraining on slabs: one iteration is Eq. 3 of the paper."""

# B slabs, V views (Vg global, Vl local), D embedding

from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler

from common.engines.pretraining_trainer import PretrainingTrainer, Terms
from common.losses.auxiliary import AuxiliaryBCELoss
from common.metrics.spread import effective_rank, kolmogorov_smirnov
from common.networks.pretraining_model import gradients_stay_here
from common.transforms.render_views import count_labels, render_views
from common.transforms.view_batch import LABEL_FIELDS, VIEW_FIELDS, Batch, on_device

Views = tuple[torch.Tensor, torch.Tensor]
Targets = dict[str, dict[str, torch.Tensor]]


class LeJEPATrainer(PretrainingTrainer):
    """Train encoder, projector and auxiliary head on views of slabs.

    SIGReg looks at the batch as a whole, so a batch that does not fit cannot just be cut up and its losses
    added. With ``micro_batch_size`` the projections of all parts are computed first, without a graph; the
    loss of the whole batch gives the gradient of each projection; then each part is computed again and that
    gradient goes through it. Value and gradient are those of the whole batch, for one forward pass more.

    ``cls_effective_rank`` and ``projection_ks`` (how far the projections' dimensions are from normal, mean
    ``kolmogorov_smirnov``) are measured on this rank's batch.

    Source: DALE-CT III-C, Eq. 1-3. Two passes for one batch: GradCache, arXiv:2101.06983.

    Args:
        lr_scheduler: stepped after every optimizer step.
        auxiliary_loss: Eq. 2 and its weight in Eq. 3, or None (DALE-CT-0).
        micro_batch_size: slabs that go through the network at once; None for the whole batch.
        shared: arguments of ``PretrainingTrainer``; ``network`` is a ``PretrainingModel``, ``loss_function``
            a ``LeJEPALoss``.

    Raises:
        ValueError: if ``micro_batch_size`` is not positive; else as ``PretrainingTrainer``.
    """

    def __init__(
        self,
        *,
        lr_scheduler: LRScheduler,
        auxiliary_loss: AuxiliaryBCELoss | None,
        micro_batch_size: int | None,
        **shared: Any,  # noqa: ANN401 (checked by the base class)
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be positive, got {micro_batch_size}.")
        super().__init__(**shared)
        self.lr_scheduler = lr_scheduler
        self.auxiliary_loss = None if auxiliary_loss is None else auxiliary_loss.to(self.state.device)
        self.micro_batch_size = micro_batch_size
        self.term_weights = dict(shared["loss_function"].weights)
        if self.auxiliary_loss is not None:
            share = self.auxiliary_loss.aux_weight / len(self.auxiliary_loss.terms)
            self.term_weights |= {f"aux_{term}": share for term in self.auxiliary_loss.terms}

    def compute(self, batch: Batch) -> tuple[Terms, dict[str, Any]]:
        """Compute Eq. 3, at once or in parts; see the class."""
        names = VIEW_FIELDS if self.auxiliary_loss is None else VIEW_FIELDS + LABEL_FIELDS
        batch = on_device(batch, names, self.state.device)
        views, targets = render_views(batch, self.hu_window), {}
        if self.auxiliary_loss is not None:
            targets = count_labels(batch, self.auxiliary_loss.rex_targets)
        if self.micro_batch_size is None or self.micro_batch_size >= len(views[0]):
            return self._at_once(batch, views, targets)
        return self._in_parts(batch, views, targets, self.micro_batch_size)

    def after_step(self) -> None:
        """Move the learning rate on."""
        self.lr_scheduler.step()

    def measure(self, output: dict[str, Any]) -> dict[str, float]:
        """Measure the CLS tokens' effective rank and the projections' distance from normal."""
        distances = torch.stack([kolmogorov_smirnov(view) for view in output["projections"].detach()])
        rank = effective_rank(output["cls"].flatten(0, 1))
        return {"cls_effective_rank": rank, "projection_ks": float(distances.mean())}

    def _at_once(self, batch: Batch, views: Views, targets: Targets) -> tuple[Terms, dict[str, Any]]:
        everything = slice(None)
        output = self._forward(views, everything)
        terms = self._lejepa(output["projections"], views)
        terms |= self._auxiliary(batch, output["logits"], targets, everything)
        loss = self.weighted(terms)
        loss.backward()
        return {"loss": loss, **terms}, output

    def _in_parts(
        self, batch: Batch, views: Views, targets: Targets, size: int
    ) -> tuple[Terms, dict[str, Any]]:
        """Compute the same with ``size`` slabs in memory at a time; see the class."""
        batch_size = len(views[0])
        parts = [slice(first, min(first + size, batch_size)) for first in range(0, batch_size, size)]
        with torch.no_grad():
            outputs = [self._forward(views, part) for part in parts]
        projections = torch.cat([output["projections"] for output in outputs], dim=1).requires_grad_()
        terms = self._lejepa(projections, views)
        self.weighted(terms).backward()
        gradient = cast(torch.Tensor, projections.grad)
        for part in parts:
            with gradients_stay_here(self.network, unless=part is parts[-1]):
                output = self._forward(views, part)
                auxiliary = self._auxiliary(batch, output["logits"], targets, part)
                through = (output["projections"] * gradient[:, part]).sum()
                (through + self.weighted(auxiliary)).backward()
            for name, value in auxiliary.items():
                terms[name] = terms.get(name, torch.zeros_like(value)) + value.detach()
        cls = torch.cat([output["cls"] for output in outputs])
        return {"loss": self.weighted(terms), **terms}, {"projections": projections, "cls": cls}

    def _forward(self, views: Views, part: slice) -> dict[str, Any]:
        with self.autocast():
            output: dict[str, Any] = self.inferer(views[0][part], self.network, views[1][part])
        # the loss runs in float32: SIGReg integrates characteristic functions, which bf16 cannot resolve
        return output | {"projections": output["projections"].float()}

    def _lejepa(self, projections: torch.Tensor, views: Views) -> Terms:
        terms: Terms = self.loss_function(
            projections, num_global=views[0].shape[1], step=self.state.iteration
        )
        return {"lejepa": terms.pop("loss"), **terms}

    def _auxiliary(self, batch: Batch, logits: Targets, targets: Targets, part: slice) -> Terms:
        if self.auxiliary_loss is None:
            return {}
        targets = {
            group: {term: target[part] for term, target in terms.items()} for group, terms in targets.items()
        }
        terms = self.auxiliary_loss(
            logits, targets, has_ts=batch["has_ts"], has_rex=batch["has_rex"], part=part
        )
        return {("aux" if name == "loss" else f"aux_{name}"): value for name, value in terms.items()}
