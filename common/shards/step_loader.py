"""Loads the batches of a run step by step, from any step on."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from torch.utils.data import DataLoader

from common.shards.slab_dataset import SlabViews, StepBatches

SHARED_MEMORY = Path("/dev/shm")
SLABS_TRIED = 8  # whose crops are measured before the workers start; our choice


def _leave_the_group(worker: int) -> None:
    """Clusters signal the process group of a job; the trainer needs its workers up to the last step.

    A worker ends when the trainer tells it to or is gone.
    """
    os.setpgid(0, 0)


class StepLoader(DataLoader):
    """A DataLoader whose batches are those of the steps of a run, also where a slab serves several steps.

    With ``draws_per_slab`` k > 1 a worker reads the slabs of k steps at once and the loader hands their
    batches out one by one; a run that resumes between them leaves out those it had.

    Args:
        dataset: what to load.
        batch_sampler: which slabs at which step; its ``start_step`` counts when an iteration starts.
        num_workers: processes that read; 0 reads in this one.
        pin_memory: whether a thread copies batches to page-locked memory, which a GPU fetches by itself.
        persistent_workers: whether workers outlive an iteration.
        prefetch_factor: batches that each worker reads ahead, each of ``draws_per_slab`` steps.

    Raises:
        ValueError: if data set and sampler differ in ``draws_per_slab``, or what the workers read ahead does
            not fit into the shared memory.
    """

    batch_sampler: StepBatches

    def __init__(
        self,
        dataset: SlabViews,
        batch_sampler: StepBatches,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
    ) -> None:
        if dataset.draws_per_slab != batch_sampler.draws_per_slab:
            raise ValueError(
                "draws_per_slab must be the same of dataset and batch_sampler, "
                f"got {dataset.draws_per_slab} and {batch_sampler.draws_per_slab}."
            )
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=dataset.collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            prefetch_factor=prefetch_factor,
            worker_init_fn=_leave_the_group,
        )
        if num_workers and SHARED_MEMORY.is_dir():  # a Linux
            self._check_shared_memory(num_workers * (prefetch_factor or 2) + 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        handed_out = self.batch_sampler.start_step % self.batch_sampler.draws_per_slab
        for steps in super().__iter__():
            yield from steps[handed_out:]
            handed_out = 0

    def _check_shared_memory(self, num_batches: int) -> None:
        """Refuse batches on their way that together outgrow what is free, which would end in a bus error."""
        sampler = self.batch_sampler
        first = sampler.rank * sampler.batch_size
        tried = range(first, first + min(SLABS_TRIED, sampler.batch_size))
        arrays = [value for place in tried for sample in self.dataset[place] for value in sample.values()]
        sizes = [value.nbytes for value in arrays if isinstance(value, np.ndarray)]
        needed = sum(sizes) * sampler.batch_size / len(tried) * num_batches
        ranks, free = idist.get_nproc_per_node(), shutil.disk_usage(SHARED_MEMORY).free
        if needed * ranks > free:
            raise ValueError(
                f"num_workers must leave room in {SHARED_MEMORY}, got {self.num_workers}: {num_batches} "
                f"batches of {sampler.batch_size} for each of {ranks} ranks take {needed * ranks / 1e9:.1f} "
                f"GB of its free {free / 1e9:.1f} GB. Lower num_workers, or enlarge it (docker --shm-size)."
            )
