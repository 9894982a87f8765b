"""Loads the batches of a run step by step, from any step on."""

import os
from typing import Any

from torch.utils.data import DataLoader

from common.shards.slab_dataset import SlabViews, StepBatches


class StepLoader(DataLoader):
    """A DataLoader of ``SlabViews`` whose workers outlive the signals that stop a trainer at its next step.

    Args:
        dataset: what to load.
        batch_sampler: which slabs at which step; its ``start_step`` counts when an iteration starts.
        options: of ``DataLoader``, such as ``num_workers``, ``pin_memory`` and ``prefetch_factor``.
    """

    batch_sampler: StepBatches

    def __init__(self, dataset: SlabViews, batch_sampler: StepBatches, **options: Any) -> None:  # noqa: ANN401
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=dataset.collate,
            worker_init_fn=_leave_the_group,
            **options,
        )


def _leave_the_group(worker: int) -> None:
    """Clusters signal the process group of a job; the trainer needs its workers up to the last step.

    A worker ends when the trainer tells it to or is gone.
    """
    os.setpgid(0, 0)
