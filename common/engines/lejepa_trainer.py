"""LeJEPA pretraining on slabs: one iteration is Eq. 3 of the paper."""

# B slabs, V views (Vg global, Vl local), S view size, D embedding, C classes, P patches

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.engines.pretraining_step import (
    Step,
    autocast_as,
    check_amp_dtype,
    keep_to_the_step,
    means_over_ranks,
    on_device,
    remember_step,
    stop_if_not_finite,
)
from common.losses.auxiliary import AuxiliaryBCELoss
from common.losses.lejepa import LeJEPALoss
from common.metrics.effective_rank import effective_rank, kolmogorov_smirnov
from common.networks.pretraining_model import clip_by_global_norm, gradients_stay_here
from common.transforms.batch_views import GROUPS, LABEL_FIELDS, VIEW_FIELDS, count_labels, render_views
from common.transforms.hounsfield import HUWindow
from common.transforms.soft_labels import finding_fractions, finding_presence

REX_TARGETS = {"presence": finding_presence, "fraction": finding_fractions}


class LeJEPATrainer(SupervisedTrainer):
    """Train encoder, projector and auxiliary head on views of slabs.

    Every random number of an iteration is a function of the run's seed and the step: the data set draws views
    from the sample's position, SIGReg its directions from the step. A resumed run therefore equals an
    unbroken one and a run on several ranks the run on one with the same global batch.

    SIGReg looks at the batch as a whole, so a batch that does not fit cannot just be cut up and its losses
    added. With ``micro_batch_size`` the projections of all parts are computed first, without a graph; the
    loss of the whole batch gives the gradient of each projection; then each part is computed again and that
    gradient goes through it. Value and gradient are those of the whole batch, for one forward pass more.

    ``engine.state.output`` is MONAI's decollated ``[{"loss": ..., <term>: ...}]``, detached means over all
    ranks; ``engine.state.cls`` the CLS tokens of the global views ``(B, Vg, D)``, detached. Nothing waits for
    the device but every ``measure_every`` steps, when the losses since are looked at, too.

    Source: DALE-CT III-C, Eq. 1-3. Two passes for one batch: GradCache, arXiv:2101.06983.

    Args:
        device: device of network and batch.
        max_epochs: number of epochs; an epoch is just ``epoch_length`` steps.
        epoch_length: optimizer steps in an epoch.
        train_data_loader: endless batches of ``SlabViews`` samples.
        network: ``PretrainingModel``, wrapped for distribution or not.
        optimizer: optimizer over all its parameters.
        lr_scheduler: stepped after every optimizer step.
        loss_function: Eq. 1.
        auxiliary_loss: Eq. 2, or None (DALE-CT-0).
        aux_weight: weight of the auxiliary loss, Eq. 3's lambda_aux.
        hu_window: clip window and z-score of the input.
        patch_size_px: side of a patch, for the patch targets.
        rex_targets: "presence" of a finding in a crop or patch, or the "fraction" it covers (released code).
        clip_norm: largest global norm of the gradient.
        amp_dtype: "bfloat16" for autocast, "float32" for none.
        measure_every: steps between two looks at whether the losses are finite, and measurements of the CLS
            tokens' effective rank and of how far the projections' dimensions are from normal (mean
            ``kolmogorov_smirnov``), on this rank's batch.
        output_dir: where the batch of a step whose loss is not finite is named.
        micro_batch_size: slabs that go through the network at once; None for the whole batch.
        inferer: how views go through the network; MONAI's SimpleInferer by default.
        train_handlers: Ignite handlers.

    Raises:
        ValueError: if ``amp_dtype`` or ``rex_targets`` is neither of the two, or ``micro_batch_size`` not
            positive.
        FloatingPointError: in training, on every rank and before anything is saved, if the loss of a step is
            not finite; names the step and the file that lists the rank's slabs.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        epoch_length: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        loss_function: LeJEPALoss,
        auxiliary_loss: AuxiliaryBCELoss | None,
        aux_weight: float,
        hu_window: HUWindow,
        patch_size_px: int,
        rex_targets: str,
        clip_norm: float,
        amp_dtype: str,
        measure_every: int,
        output_dir: str | Path,
        micro_batch_size: int | None = None,
        inferer: Inferer | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        check_amp_dtype(amp_dtype)
        if rex_targets not in REX_TARGETS:
            raise ValueError(f"rex_targets must be one of {list(REX_TARGETS)}, got {rex_targets!r}.")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be positive, got {micro_batch_size}.")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            epoch_length=epoch_length,
            inferer=inferer,
            decollate=False,
        )
        self.lr_scheduler = lr_scheduler
        self.auxiliary_loss = auxiliary_loss.to(device) if auxiliary_loss is not None else None
        self.aux_weight = aux_weight
        self.hu_window = hu_window
        self.patch_size_px = patch_size_px
        self.rex_targets = REX_TARGETS[rex_targets]
        self.clip_norm = clip_norm
        self.amp_dtype = amp_dtype
        self.measure_every = measure_every
        self.output_dir = Path(output_dir)
        self.micro_batch_size = micro_batch_size
        self.unchecked: list[Step] = []
        keep_to_the_step(self)
        self._register_handlers(list(train_handlers or []))

    def _iteration(  # type: ignore[override]
        self, engine: Engine, batchdata: dict[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        names = VIEW_FIELDS if self.auxiliary_loss is None else VIEW_FIELDS + LABEL_FIELDS
        batch = on_device(batchdata, names, self.state.device)
        batch["inputs"] = dict(zip(GROUPS, render_views(batch, self.hu_window), strict=True))
        if self.auxiliary_loss is not None:
            batch["targets"] = count_labels(batch, self.patch_size_px, self.rex_targets)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        batch_size, num_global = batch["inputs"]["global"].shape[:2]
        if self.micro_batch_size is None or self.micro_batch_size >= batch_size:
            terms, output = self._backward(batch, num_global)
        else:
            terms, output = self._backward_in_parts(batch, num_global, batch_size)
        terms["grad_norm"] = clip_by_global_norm(self.network, self.clip_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        means = means_over_ranks(terms)
        remember_step(self, means["loss"], batchdata)
        self.state.cls = output["cls"].detach()
        if engine.state.iteration % self.measure_every == 0:
            stop_if_not_finite(self)
            self._measure(output)
        return [means]

    def _forward(self, batch: dict[str, Any], part: slice) -> dict[str, Any]:
        with autocast_as(self.amp_dtype, self.state.device):
            inputs = batch["inputs"]
            output: dict[str, Any] = self.inferer(inputs["global"][part], self.network, inputs["local"][part])
        # the loss runs in float32: SIGReg integrates characteristic functions, which bf16 cannot resolve
        return output | {"projections": output["projections"].float()}

    def _lejepa(self, projections: torch.Tensor, num_global: int) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = self.loss_function(
            projections, num_global=num_global, step=self.state.iteration
        )
        return {"lejepa": terms.pop("loss"), **terms}

    def _auxiliary(self, batch: dict[str, Any], logits: dict, part: slice) -> dict[str, torch.Tensor]:
        if self.auxiliary_loss is None:
            return {}
        targets = {
            group: {term: target[part] for term, target in terms.items()}
            for group, terms in batch["targets"].items()
        }
        terms = self.auxiliary_loss(
            logits, targets, has_ts=batch["has_ts"], has_rex=batch["has_rex"], part=part
        )
        return {("aux" if name == "loss" else f"aux_{name}"): value for name, value in terms.items()}

    def _total(self, terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        loss = terms["lejepa"] + self.aux_weight * terms["aux"] if "aux" in terms else terms["lejepa"]
        return {"loss": loss, **terms}

    def _backward(
        self, batch: dict[str, Any], num_global: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Compute loss and gradient of a batch at once."""
        everything = slice(None)
        output = self._forward(batch, everything)
        terms = self._lejepa(output["projections"], num_global)
        terms = self._total(terms | self._auxiliary(batch, output["logits"], everything))
        terms["loss"].backward()
        return terms, output

    def _backward_in_parts(
        self, batch: dict[str, Any], num_global: int, batch_size: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Compute the same with ``micro_batch_size`` slabs in memory at a time; see the class."""
        size = self.micro_batch_size or batch_size
        parts = [slice(first, min(first + size, batch_size)) for first in range(0, batch_size, size)]
        with torch.no_grad():
            outputs = [self._forward(batch, part) for part in parts]
        projections = torch.cat([output["projections"] for output in outputs], dim=1).requires_grad_()
        terms = self._lejepa(projections, num_global)
        terms["lejepa"].backward()
        gradient = cast(torch.Tensor, projections.grad)
        for part in parts:
            with gradients_stay_here(self.network, unless=part is parts[-1]):
                output = self._forward(batch, part)
                auxiliary = self._auxiliary(batch, output["logits"], part)
                through = (output["projections"] * gradient[:, part]).sum()
                (through + self.aux_weight * auxiliary["aux"] if auxiliary else through).backward()
            for name, value in auxiliary.items():
                terms[name] = terms.get(name, torch.zeros_like(value)) + value.detach()
        cls = torch.cat([output["cls"] for output in outputs])
        return self._total(terms), {"projections": projections, "cls": cls}

    def _measure(self, output: dict[str, Any]) -> None:
        views = output["projections"].detach()
        self.state.metrics["cls_effective_rank"] = effective_rank(output["cls"].flatten(0, 1))
        distances = torch.stack([kolmogorov_smirnov(view) for view in views])
        self.state.metrics["projection_ks"] = float(distances.mean())
