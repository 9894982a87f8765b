"""The chosen probe trained again with other seeds, all side by side: how much chance is in a result."""

# N volumes, D embedding, C classes, F fixed poolers

import inspect
import logging
from collections.abc import Callable, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from common.embeddings.bags import BagReader, ShuffledBatches
from common.networks.mil_probe import MILProbe, ProbeGrid, probe_name

logger = logging.getLogger(__name__)


def train_seeds(
    seeds: Sequence[int],
    grid: ProbeGrid,
    index: int,
    num_steps: int,
    batch_size: int,
    reader: BagReader,
    fixed: torch.Tensor,
    labels: torch.Tensor,
    loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: Optimizer,
    lr_scheduler: LambdaLR,
) -> list[MILProbe]:
    """Train one probe of a grid anew for each seed, in one pass, as the grid trained it.

    A seed decides on the initial weights and on the order of the batches: on all that chance decides in
    training a probe. The probes share no parameter, so that each ends where it would alone.

    Args:
        seeds: one probe each.
        grid: has the probe whose pooler and learning rate are wanted.
        index: its place in ``grid.names``.
        num_steps: optimizer steps.
        batch_size: bags of a batch.
        reader: bags of the training cohort.
        fixed: ``grid.fixed_features`` of the training cohort.
        labels: of the training cohort.
        loss_function: element-wise loss of logits and labels.
        optimizer: of the grid; another of its kind, with its settings, is made.
        lr_scheduler: of the grid; its schedule for the learning rate is followed.

    Shape:
        ``fixed (N, F, D)``, ``labels (N, C)``.

    Returns:
        The trained probes, in the order of the seeds.
    """
    if not seeds:
        return []
    pooler, learning_rate = grid.names[index]
    logger.info(
        "Training %s for %d steps with the seeds %s.", probe_name(*grid.names[index]), num_steps, [*seeds]
    )
    rate, place = divmod(index, len(grid.kinds))
    first = grid.kinds[:place].count("fixed")
    own_fixed = fixed[:, first : first + (grid.kinds[place] == "fixed")]
    grids = [ProbeGrid([pooler], [learning_rate], grid.dim, grid.num_classes, seed) for seed in seeds]
    grids = [of_seed.to(grid.weights[0]) for of_seed in grids]
    batches = [ShuffledBatches(len(labels), batch_size, seed) for seed in seeds]
    groups = [group for of_seed in grids for group in of_seed.parameter_groups()]
    accepted = inspect.signature(type(optimizer)).parameters  # AdamW's defaults hold more than it accepts
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    another = type(optimizer)(groups, **settings)
    scheduler = LambdaLR(another, lr_scheduler.lr_lambdas[rate])
    for step in range(num_steps):
        another.zero_grad(set_to_none=True)
        loss = labels.new_zeros(())
        for of_seed, batches_of_seed in zip(grids, batches, strict=True):
            chosen = batches_of_seed.batch(step)
            logits = of_seed(own_fixed[chosen], reader(chosen))[0]
            loss = loss + loss_function(logits, labels[chosen].to(logits)).mean()
        loss.backward()
        another.step()
        scheduler.step()
    return [of_seed.probe(0) for of_seed in grids]
