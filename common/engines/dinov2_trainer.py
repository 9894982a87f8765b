"""DINOv2 pretraining on slabs: a student that predicts what a slowly following teacher says."""

# B slabs, V views (Vg global, Vl local), D embedding

from typing import Any

import torch
from torch import nn

from common.engines.pretraining_trainer import PretrainingTrainer, Terms
from common.losses.dino import IBOTLoss, koleo_loss
from common.metrics.spread import effective_rank
from common.networks.dino_model import follow
from common.optimizers.dino_schedule import DINOSchedule
from common.transforms.render_views import render_views
from common.transforms.view_batch import MASK_FIELDS, VIEW_FIELDS, Batch, on_device


class DINOv2Trainer(PretrainingTrainer):
    """Train a student on masked global and on local views towards a teacher that sees the global ones.

    There is no stochastic depth, which DINOv2 has: its random numbers would belong to ranks.

    Terms: ``dino``, ``ibot`` and ``koleo``; ``teacher_entropy``, at most log(number of prototypes), and
    ``kl``, both of the DINO pairs: a constant teacher leaves nothing to predict, kl 0; ``centre_norm`` and
    ``ibot_centre_norm`` of the teacher's mean logits. ``engine.state.cls`` is the teacher's.

    Source: DINOv2, arXiv:2304.07193, section 4; DALE-CT III-B. The gradient is clipped by the norm over the
    whole student (DINOv2: encoder and heads each).

    Args:
        teacher: teacher of ``new_teacher``, spread over the ranks as the student is.
        schedule: schedule of the optimizer and the teacher.
        ibot_loss: iBOT's loss.
        ibot_weight: its weight. DINOv2: 1.
        koleo_weight: weight of KoLeo on the student's global CLS tokens; 0 leaves it out. DINOv2: 0.1.
        shared: arguments of ``PretrainingTrainer``; ``network`` is the student, a ``DINOModel``,
            ``loss_function`` a ``DINOLoss``, and batches have ``PatchMasks``.

    Raises:
        ValueError: if a weight is negative; else as ``PretrainingTrainer``.
    """

    def __init__(
        self,
        *,
        teacher: nn.Module,
        schedule: DINOSchedule,
        ibot_loss: IBOTLoss,
        ibot_weight: float,
        koleo_weight: float,
        **shared: Any,  # noqa: ANN401 (checked by the base class)
    ) -> None:
        for name, weight in (("ibot_weight", ibot_weight), ("koleo_weight", koleo_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must not be negative, got {weight}.")
        super().__init__(**shared)
        self.teacher = teacher
        self.schedule = schedule
        self.ibot_loss = ibot_loss.to(self.state.device)
        self.loss_modules.append(self.ibot_loss)
        self.term_weights = {"dino": 1.0, "ibot": ibot_weight}
        if koleo_weight:
            self.term_weights["koleo"] = koleo_weight

    def compute(self, batch: Batch) -> tuple[Terms, dict[str, Any]]:
        """Compute the losses; the output is the teacher's."""
        batch = on_device(batch, VIEW_FIELDS + MASK_FIELDS, self.state.device)
        global_views, local_views = render_views(batch, self.hu_window)
        masks, places, weights = batch["masks"], batch["masked_places"], batch["masked_weights"]
        self.now = self.schedule.set_step(self.state.iteration - 1)
        with torch.no_grad(), self.autocast():
            target = self.teacher(global_views, None, None, places)
        with self.autocast():
            output: Terms = self.inferer(global_views, self.network, local_views, masks, places)
        temperature, num_views = self.now.temperature, masks.shape[0] * masks.shape[1]
        dino = self.loss_function(output["cls_logits"], target["cls_logits"], temperature)
        ibot = self.ibot_loss(output["patch_logits"], target["patch_logits"], weights, num_views, temperature)
        terms = {"dino": dino.pop("loss"), **dino, "ibot": ibot["loss"]}
        terms["ibot_centre_norm"] = ibot["centre_norm"]
        if "koleo" in self.term_weights:
            terms["koleo"] = koleo_loss(output["cls"])
        loss = self.weighted(terms)
        loss.backward()
        return {"loss": loss, **terms}, target

    def after_step(self) -> None:
        """Move the teacher towards the student."""
        follow(self.teacher, self.network, self.now.momentum)
        self.state.metrics |= {"teacher_momentum": self.now.momentum, "teacher_temp": self.now.temperature}
        self.state.metrics["weight_decay"] = max(g["weight_decay"] for g in self.optimizer.param_groups)

    def measure(self, output: dict[str, Any]) -> dict[str, float]:
        """Measure the effective rank of the teacher's CLS tokens."""
        return {"cls_effective_rank": effective_rank(output["cls"].flatten(0, 1))}
