"""Loads the batches of a run step by step, from any step on."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from common.shards.slab_dataset import SlabViews, StepBatches


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
        ValueError: if data set and sampler differ in ``draws_per_slab``.
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

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        handed_out = self.batch_sampler.start_step % self.batch_sampler.draws_per_slab
        for steps in super().__iter__():
            yield from steps[handed_out:]
            handed_out = 0
