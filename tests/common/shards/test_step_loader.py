"""The batches of a run come step by step, the same from any step on and from any number of workers."""

import multiprocessing
import os
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.shards import step_loader
from common.shards.slab_dataset import SlabViews, StepBatches
from common.shards.step_loader import StepLoader
from common.transforms.multi_crop import RandSlabMultiCrop


@pytest.fixture
def slabs(slabs_of):
    """Return ``slabs(draws_per_slab)``: slabs of slices of different sizes."""
    rng = np.random.default_rng(0)
    hu = [rng.integers(-1024, 3072, (z, 20 + z, 40)).astype(np.int16) for z in (3, 8, 5, 6, 2)]
    ts = rng.integers(0, 2, (8, 128, 128)).astype(np.uint8)

    def make(draws_per_slab: int = 1) -> SlabViews:
        scans = [{"hu": one, "ts": ts[: len(one)]} for one in hu]
        crop = RandSlabMultiCrop(16, 8, patch_size_px=8)
        return slabs_of(scans, crop, slab_mm=2.0, draws_per_slab=draws_per_slab)

    return make


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name])
        if isinstance(one[name], torch.Tensor) and not one[name].is_floating_point()
        else torch.allclose(one[name], other[name], rtol=0, atol=0, equal_nan=True)
        if isinstance(one[name], torch.Tensor)
        else one[name] == other[name]
        for name in one
    )


def steps(slabs: SlabViews, number: int, start_step: int = 0, **options) -> list[dict]:
    batches = StepBatches(3, rank=1, world_size=2, draws_per_slab=slabs.draws_per_slab)
    loader = StepLoader(slabs, batches, **options)
    loader.batch_sampler.start_step = start_step
    return list(islice(loader, number))


@pytest.mark.parametrize("draws_per_slab", [1, 3])
def test_workers_give_the_batches_of_a_single_process(slabs, draws_per_slab):
    alone = steps(slabs(draws_per_slab), 7)
    workers = steps(slabs(draws_per_slab), 7, num_workers=2)
    assert all(map(equal, alone, workers))


@pytest.mark.parametrize("draws_per_slab", [1, 2, 3])
def test_a_run_goes_on_at_any_step_where_an_unbroken_one_is(slabs, draws_per_slab):
    unbroken = steps(slabs(draws_per_slab), 9)
    for start in range(7):
        resumed = steps(slabs(draws_per_slab), 9 - start, start_step=start)
        assert all(map(equal, resumed, unbroken[start:]))
    assert not equal(unbroken[0], unbroken[1])


def test_consecutive_steps_share_slabs_and_no_view(slabs):
    batches = steps(slabs(3), 6)
    where = [(batch["volume"], batch["first_slice"].tolist()) for batch in batches]
    assert where[0] == where[1] == where[2] != where[3] == where[4] == where[5]
    positions = torch.cat([batch["position"] for batch in batches])
    assert len(positions.unique()) == len(positions)
    gammas = torch.cat([batch["gamma"].flatten() for batch in batches])
    assert len(gammas[gammas != 1].unique()) == (gammas != 1).sum()


def test_an_iteration_starts_anew(slabs):
    loader = StepLoader(slabs(2), StepBatches(2, 0, 1, start_step=3, draws_per_slab=2), num_workers=1)
    first, again = (list(islice(loader, 3)) for _ in range(2))
    assert all(map(equal, first, again))


def test_a_sampler_of_other_draws_is_refused(slabs):
    with pytest.raises(ValueError, match="draws_per_slab must be the same of .* got 2 and 1"):
        StepLoader(slabs(2), StepBatches(2, 0, 1))


def test_a_signal_to_the_trainers_group_leaves_its_workers_alone(slabs):
    loader = StepLoader(slabs(), StepBatches(3, rank=0, world_size=1), num_workers=1)
    batches = iter(loader)
    next(batches)
    [worker] = multiprocessing.active_children()
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)


@pytest.mark.parametrize("draws_per_slab", [1, 3])
def test_batches_that_outgrow_the_shared_memory_are_refused_before_the_workers_start(
    slabs, monkeypatch, draws_per_slab
):
    tensors = [
        [tensor for tensor in batch.values() if isinstance(tensor, torch.Tensor)]
        for batch in steps(slabs(draws_per_slab), 60)
    ]
    of_batch = np.mean([sum(tensor.nbytes for tensor in batch) for batch in tensors])
    free = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    options = {"num_workers": 2, "prefetch_factor": 4}
    needed = of_batch * draws_per_slab * (2 * 4 + 1) * 8
    monkeypatch.setattr("ignite.distributed.get_nproc_per_node", lambda: 8)
    free[step_loader.SHARED_MEMORY] = 1.5 * needed
    steps(slabs(draws_per_slab), 0, **options)
    free[step_loader.SHARED_MEMORY] = 0.5 * needed
    with pytest.raises(ValueError, match=r"num_workers must leave room in .*, got 2: .* 8 ranks take .* GB"):
        steps(slabs(draws_per_slab), 0, **options)
    steps(slabs(draws_per_slab), 1)  # without workers there is none
    monkeypatch.setattr(step_loader, "SHARED_MEMORY", Path("/nowhere"))
    steps(slabs(draws_per_slab), 0, **options)
