"""DINOv2's schedules: learning rate, weight decay, the teacher's momentum and its temperature."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

from torch.optim import Optimizer

from common.optimizers.adamw import warmup_cosine_factor


class TeacherStep(NamedTuple):
    """What a step needs of the schedules beside the optimizer.

    Args:
        momentum: share of the teacher's parameters that stays.
        temperature: temperature of the teacher's logits.
    """

    momentum: float
    temperature: float


def cosine(step: int, start: float, end: float, max_steps: int) -> float:
    """Return the value of half a cosine from ``start`` at step 0 to ``end`` at ``max_steps`` and after."""
    progress = min(1.0, step / max_steps)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class DINOSchedule:
    """Set an optimizer to a step of the run; all schedules are functions of the step and keep no state.

    The learning rate rises from 0 to the peak and falls to ``final_lr`` along a cosine; weight decay and the
    teacher's momentum follow a cosine over the whole run; the teacher's temperature rises to its final value.
    The last layers of the heads stand still at first. Each group's learning rate has its own multiplier.

    Source: DINOv2, arXiv:2304.07193, appendix C, and its ViT-L/14 configuration. Where that counts in epochs
    (500 of 1,250 steps), the same share of our run: 30 epochs of rising temperature are 6 % and one of a
    frozen last layer is 0.2 %; DALE-CT's 3,300 of 20,000 steps of warm-up are its 80 epochs, 16 %.

    Args:
        optimizer: optimizer of ``layerwise_adamw``.
        max_steps: steps of the run.
        warmup_steps: steps of the learning rate's rise. DALE-CT III-B: 3,300.
        lr: peak learning rate.
        final_lr: learning rate at the end.
        weight_decay: first and last value. DINOv2: 0.04 and 0.2.
        teacher_momentum: first and last value. DINOv2: 0.994 and 1.
        teacher_temp: first and final value. DINOv2: 0.04 and 0.07.
        teacher_temp_warmup_steps: steps of its rise.
        freeze_last_layer_steps: steps with a learning rate of 0 for the heads' last layers.

    Raises:
        ValueError: if a number of steps is negative or longer than the run, or a pair is not one.
    """

    optimizer: Optimizer
    _: KW_ONLY
    max_steps: int
    warmup_steps: int
    lr: float
    final_lr: float
    weight_decay: tuple[float, float]
    teacher_momentum: tuple[float, float]
    teacher_temp: tuple[float, float]
    teacher_temp_warmup_steps: int
    freeze_last_layer_steps: int

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "teacher_temp_warmup_steps", "freeze_last_layer_steps"):
            if not 0 <= getattr(self, name) <= self.max_steps:
                raise ValueError(
                    f"{name} must be between 0 and max_steps = {self.max_steps}, got {getattr(self, name)}."
                )
        for name in ("weight_decay", "teacher_momentum", "teacher_temp"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} must be a first and a last value, got {getattr(self, name)}.")
        if not min(self.teacher_temp) > 0:
            raise ValueError(f"teacher_temp must be positive, got {self.teacher_temp}.")

    def set_step(self, step: int) -> TeacherStep:
        """Give every group its learning rate and weight decay; return what the teacher needs in this step."""
        floor = self.final_lr / self.lr
        lr = self.lr * warmup_cosine_factor(step, self.warmup_steps, self.max_steps, floor)
        weight_decay = cosine(step, *self.weight_decay, self.max_steps)
        for group in self.optimizer.param_groups:
            frozen = group["is_last_layer"] and step < self.freeze_last_layer_steps
            group["lr"] = 0.0 if frozen else lr * group["lr_multiplier"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        first, last = self.teacher_temp
        risen = min(1.0, step / self.teacher_temp_warmup_steps) if self.teacher_temp_warmup_steps else 1.0
        momentum = cosine(step, *self.teacher_momentum, self.max_steps)
        return TeacherStep(momentum, first + (last - first) * risen)
