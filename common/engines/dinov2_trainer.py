"""DINOv2 pretraining on slabs: a student that tells what a slowly following teacher sees."""

# B slabs, V views (Vg global, Vl local), D embedding, K prototypes

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer

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
from common.losses.dino import DINOLoss, IBOTLoss
from common.losses.koleo import koleo_loss
from common.metrics.effective_rank import effective_rank
from common.networks.dino_model import follow
from common.networks.pretraining_model import clip_by_global_norm
from common.optimizers.dino_schedule import DINOSchedule
from common.transforms.batch_views import GROUPS, VIEW_FIELDS, render_views
from common.transforms.hounsfield import HUWindow

MASK_FIELDS = ("masks", "masked_places", "masked_weights")
"""What of a batch the networks and iBOT's loss read on the device, beside the views."""


class DINOv2Trainer(SupervisedTrainer):
    """Train a student on masked global and on local views towards a teacher that sees the global ones.

    Every random number of an iteration, views and masks, is a function of the run's seed and of a slab's
    place, and every schedule of the step: a resumed run equals an unbroken one and a run on several ranks the
    run on one with the same global batch. So there is no stochastic depth, which DINOv2 has: its random
    numbers would belong to ranks.

    ``engine.state.output`` is MONAI's decollated ``[{"loss": ..., <term>: ...}]``, detached means over all
    ranks: ``dino``, ``ibot`` and ``koleo``; ``teacher_entropy``, at most log(number of prototypes), and
    ``kl``, both of the DINO pairs: a constant teacher leaves nothing to tell, kl 0; ``centre_norm`` and
    ``ibot_centre_norm`` of the teacher's mean logits; ``grad_norm``. ``engine.state.cls`` holds the teacher's
    CLS tokens of the global views ``(B, Vg, D)``. Nothing waits for the device but every ``measure_every``
    steps, when the losses since are looked at, too.

    Source: DINOv2, arXiv:2304.07193, section 4; DALE-CT III-B. The gradient is clipped by the norm over the
    whole student (DINOv2: encoder and heads each).

    Args:
        device: device of networks and batch.
        max_epochs: number of epochs; an epoch is just ``epoch_length`` steps.
        epoch_length: optimizer steps in an epoch.
        train_data_loader: endless batches of ``SlabViews`` samples with ``PatchMasks``.
        network: the student, ``DINOModel``, wrapped for distribution or not.
        teacher: of ``new_teacher``, spread as the student is.
        optimizer: of the student's parameters.
        schedule: of the optimizer and the teacher.
        loss_function: DINO's.
        ibot_loss: iBOT's.
        ibot_weight: its weight. DINOv2: 1.
        koleo_weight: weight of KoLeo on the student's global CLS tokens; 0 leaves it out. DINOv2: 0.1.
        hu_window: clip window and z-score of the input.
        clip_norm: largest global norm of the gradient.
        amp_dtype: "bfloat16" for autocast, "float32" for none; losses are in float32 either way.
        measure_every: steps between two looks at whether the losses are finite, and measurements of the
            effective rank of ``engine.state.cls``.
        output_dir: where the batch of a step whose loss is not finite is named.
        inferer: how views go through the student; MONAI's SimpleInferer by default.
        train_handlers: Ignite handlers.

    Raises:
        ValueError: if ``amp_dtype`` is neither of the two, or a weight negative.
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
        teacher: nn.Module,
        optimizer: Optimizer,
        schedule: DINOSchedule,
        loss_function: DINOLoss,
        ibot_loss: IBOTLoss,
        ibot_weight: float,
        koleo_weight: float,
        hu_window: HUWindow,
        clip_norm: float,
        amp_dtype: str,
        measure_every: int,
        output_dir: str | Path,
        inferer: Inferer | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        check_amp_dtype(amp_dtype)
        for name, weight in (("ibot_weight", ibot_weight), ("koleo_weight", koleo_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}.")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function.to(device),
            epoch_length=epoch_length,
            inferer=inferer,
            decollate=False,
        )
        self.teacher = teacher
        self.schedule = schedule
        self.ibot_loss = ibot_loss.to(device)
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.hu_window = hu_window
        self.clip_norm = clip_norm
        self.amp_dtype = amp_dtype
        self.measure_every = measure_every
        self.output_dir = Path(output_dir)
        self.unchecked: list[Step] = []
        keep_to_the_step(self)
        self._register_handlers(list(train_handlers or []))

    def _iteration(  # type: ignore[override]
        self, engine: Engine, batchdata: dict[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        batch = on_device(batchdata, VIEW_FIELDS + MASK_FIELDS, self.state.device)
        views = dict(zip(GROUPS, render_views(batch, self.hu_window), strict=True))
        now = self.schedule.set_step(engine.state.iteration - 1)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), autocast_as(self.amp_dtype, self.state.device):
            seen = self.teacher(views["global"], None, None, batch["masked_places"])
        with autocast_as(self.amp_dtype, self.state.device):
            told: dict[str, torch.Tensor] = self.inferer(
                views["global"], self.network, views["local"], batch["masks"], batch["masked_places"]
            )
        terms = self._terms(told, seen, batch["masked_weights"], now.temperature)
        terms["loss"].backward()
        terms["grad_norm"] = clip_by_global_norm(self.network, self.clip_norm)
        self.optimizer.step()
        follow(self.teacher, self.network, now.momentum)
        means = means_over_ranks(terms)
        remember_step(self, means["loss"], batchdata)
        self.state.cls = seen["cls"]
        self.state.metrics |= {"teacher_momentum": now.momentum, "teacher_temp": now.temperature}
        self.state.metrics["weight_decay"] = max(g["weight_decay"] for g in self.optimizer.param_groups)
        if engine.state.iteration % self.measure_every == 0:
            stop_if_not_finite(self)
            self.state.metrics["cls_effective_rank"] = effective_rank(seen["cls"].flatten(0, 1))
        return [means]

    def _terms(
        self,
        told: dict[str, torch.Tensor],
        seen: dict[str, torch.Tensor],
        weights: torch.Tensor,
        temperature: float,
    ) -> dict[str, torch.Tensor]:
        dino = self.loss_function(told["cls_logits"], seen["cls_logits"], temperature)
        num_views = seen["cls"].shape[0] * seen["cls"].shape[1]
        ibot = self.ibot_loss(told["patch_logits"], seen["patch_logits"], weights, num_views, temperature)
        terms = {"dino": dino.pop("loss"), **dino, "ibot": ibot["loss"]}
        terms["ibot_centre_norm"] = ibot["centre_norm"]
        loss = terms["dino"] + self.ibot_weight * terms["ibot"]
        if self.koleo_weight:
            terms["koleo"] = koleo_loss(told["cls"])
            loss = loss + self.koleo_weight * terms["koleo"]
        return {"loss": loss, **terms}
