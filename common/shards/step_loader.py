"""Loads the batches of a run step by step, from any step on."""

import os
import shutil
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from torch.utils.data import DataLoader

from common.shards.slab_dataset import SlabViews, StepBatches

SHARED_MEMORY = Path("/dev/shm")
SLABS_TRIED = 8  # whose crops are measured before the workers start; our choice


class StepLoader(DataLoader):
    """A DataLoader of ``SlabViews`` whose workers outlive the signals that stop a trainer at its next step.

    Args:
        dataset: what to load.
        batch_sampler: which slabs at which step; its ``start_step`` counts when an iteration starts.
        options: of ``DataLoader``, such as ``num_workers``, ``pin_memory`` and ``prefetch_factor``.

    Raises:
        ValueError: if what the workers read ahead does not fit into the shared memory.
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
        if self.num_workers and SHARED_MEMORY.is_dir():  # a Linux
            self._check_shared_memory(self.num_workers * (self.prefetch_factor or 2) + 1)

    def _check_shared_memory(self, num_batches: int) -> None:
        """Refuse batches on their way that together outgrow what is free, which would end in a bus error."""
        sampler = self.batch_sampler
        first = sampler.rank * sampler.batch_size
        tried = range(first, first + min(SLABS_TRIED, sampler.batch_size))
        arrays = [value for place in tried for value in self.dataset[place].values()]
        sizes = [value.nbytes for value in arrays if isinstance(value, np.ndarray)]
        needed = sum(sizes) * sampler.batch_size / len(tried) * num_batches
        ranks, free = idist.get_nproc_per_node(), shutil.disk_usage(SHARED_MEMORY).free
        if needed * ranks > free:
            raise ValueError(
                f"num_workers must leave room in {SHARED_MEMORY}, got {self.num_workers}: {num_batches} "
                f"batches of {sampler.batch_size} for each of {ranks} ranks take {needed * ranks / 1e9:.1f} "
                f"GB of its free {free / 1e9:.1f} GB. Lower num_workers, or enlarge it (docker --shm-size)."
            )


def _leave_the_group(worker: int) -> None:
    """Clusters signal the process group of a job; the trainer needs its workers up to the last step.

    A worker ends when the trainer tells it to or is gone.
    """
    os.setpgid(0, 0)
