"""DINOv2's schedules: learning rate, weight decay, the teacher's momentum and its temperature."""

import math
from typing import NamedTuple

from torch.optim import Optimizer

from common.optimizers.adamw import warmup_cosine_factor


class TeacherStep(NamedTuple):
    """What a step needs of the schedules beside the optimizer.

    Args:
        momentum: share of the teacher's parameters that stays.
        temperature: of the teacher's logits.
    """

    momentum: float
    temperature: float


def cosine(step: int, start: float, end: float, max_steps: int) -> float:
    """Return the value of half a cosine from ``start`` at step 0 to ``end`` at ``max_steps`` and after.

    Example:
        >>> [round(cosine(step, 0.994, 1.0, 4), 6) for step in (0, 2, 4, 9)]
        [0.994, 0.997, 1.0, 1.0]
    """
    progress = min(1.0, step / max_steps)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


class DINOSchedule:
    """Set an optimizer to a step of the run; all schedules are functions of the step and keep no state.

    The learning rate rises from 0 to the peak and falls to ``final_lr`` along a cosine; weight decay and the
    teacher's momentum follow a cosine over the whole run; the teacher's temperature rises to its final value.
    The last layers of the heads stand still at first. Each group's learning rate has its own multiplier.

    Source: DINOv2, arXiv:2304.07193, appendix C, and its ViT-L/14 configuration. Where that counts in epochs
    (500 of 1,250 steps), the same share of our run: 30 epochs of rising temperature are 6 % and one of a
    frozen last layer is 0.2 %; DALE-CT's own 3,300 of 20,000 steps of warm-up are its 80 epochs, 16 %.

    Args:
        optimizer: of ``layerwise_adamw``.
        max_steps: of the run.
        warmup_steps: of the learning rate. DALE-CT III-B: 3,300.
        lr: peak.
        final_lr: at the end.
        weight_decay: first and last value. DINOv2: 0.04 and 0.2.
        teacher_momentum: first and last value. DINOv2: 0.994 and 1.
        teacher_temp: first and final value. DINOv2: 0.04 and 0.07.
        teacher_temp_warmup_steps: until the final one.
        freeze_last_layer_steps: with a learning rate of 0 for the heads' last layers.

    Raises:
        ValueError: if a number of steps is negative or longer than the run, or a pair is not one.

    Example:
        >>> import torch
        >>> from common.optimizers.adamw import layerwise_adamw
        >>> rates = {"lr": 0.1, "layer_decay": 1.0, "patch_embed_lr_multiplier": 0.2}
        >>> optimizer = layerwise_adamw(torch.nn.Linear(2, 1), depth=1, weight_decay=0.04, **rates)
        >>> steps = {"max_steps": 10, "warmup_steps": 4, "teacher_temp_warmup_steps": 3}
        >>> rates = {"lr": 0.1, "final_lr": 0.01, "weight_decay": [0.04, 0.2], "freeze_last_layer_steps": 1}
        >>> teacher = {"teacher_momentum": [0.5, 1.0], "teacher_temp": [0.04, 0.07]}
        >>> DINOSchedule(optimizer, **steps, **rates, **teacher).set_step(2)
        TeacherStep(momentum=0.5477, temperature=0.06)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_steps: int,
        warmup_steps: int,
        lr: float,
        final_lr: float,
        weight_decay: tuple[float, float],
        teacher_momentum: tuple[float, float],
        teacher_temp: tuple[float, float],
        teacher_temp_warmup_steps: int,
        freeze_last_layer_steps: int,
    ) -> None:
        steps = {
            "warmup_steps": warmup_steps,
            "teacher_temp_warmup_steps": teacher_temp_warmup_steps,
            "freeze_last_layer_steps": freeze_last_layer_steps,
        }
        for name, number in steps.items():
            if not 0 <= number <= max_steps:
                raise ValueError(f"{name} must be between 0 and max_steps = {max_steps}, got {number}.")
        pairs = {"weight_decay": weight_decay, "teacher_momentum": teacher_momentum}
        pairs |= {"teacher_temp": teacher_temp}
        for name, pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(f"{name} must be a first and a last value, got {pair}.")
        if not min(teacher_temp) > 0:
            raise ValueError(f"teacher_temp must be positive, got {teacher_temp}.")
        self.optimizer = optimizer
        self.max_steps = max_steps
        self.warmup_steps = warmup_steps
        self.lr = lr
        self.final_lr = final_lr
        self.weight_decay = weight_decay
        self.teacher_momentum = teacher_momentum
        self.teacher_temp = teacher_temp
        self.teacher_temp_warmup_steps = teacher_temp_warmup_steps
        self.freeze_last_layer_steps = freeze_last_layer_steps

    def set_step(self, step: int) -> TeacherStep:
        """Give every group its learning rate and weight decay.

        Args:
            step: optimizer step, from 0.

        Returns:
            What the teacher needs in this step.
        """
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
