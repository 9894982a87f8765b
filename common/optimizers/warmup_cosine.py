"""Learning rate: linear warm-up from zero, then cosine decay to a floor."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine_factor(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Return the share of the peak learning rate that optimizer step number ``step`` (from 0) uses.

    Args:
        step: optimizer step, from 0.
        warmup_steps: steps of linear rise from 0; step ``warmup_steps`` runs at the peak.
        total_steps: the step at which the floor is reached.
        floor: final share of the peak.

    Example:
        >>> [round(warmup_cosine_factor(s, 2, 6, 0.1), 3) for s in (0, 1, 2, 4, 6, 9)]
        [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, final_lr: float) -> LambdaLR:
    """Schedule every parameter group from 0 to its own ``lr`` and down to ``final_lr``.

    Source: DALE-CT's recipe: 0 to 3e-4 over 5,000 steps, cosine to 3e-5 at 50,000.

    Args:
        optimizer: optimizer whose groups hold the peak learning rate.
        warmup_steps: steps of the linear rise.
        total_steps: step at which ``final_lr`` is reached.
        final_lr: learning rate at the end and after it.

    Raises:
        ValueError: if the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps must be between 0 and max_steps = {total_steps}, got {warmup_steps}.")
    factor = partial(warmup_cosine_factor, warmup_steps=warmup_steps, total_steps=total_steps)
    return LambdaLR(
        optimizer, [partial(factor, floor=final_lr / group["lr"]) for group in optimizer.param_groups]
    )
