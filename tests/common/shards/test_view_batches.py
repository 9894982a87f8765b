"""Samples of slices of different sizes become one batch without losing a pixel."""

import multiprocessing
import os
import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.shards import slab_dataset as step_loader
from common.shards.slab_dataset import SlabViews, StepBatches, StepLoader
from common.shards.view_batches import collate_views
from common.transforms.multi_crop import RandSlabMultiCrop


def scans() -> list[dict]:
    rng = np.random.default_rng(0)
    ts = rng.integers(0, 118, (4, 128, 128)).astype(np.uint8)
    ts[1] = 0
    rex = np.zeros((4, 128, 128), np.uint16)
    rex[2, 5, 6] = 1 << 13
    shapes = ((4, 64, 50), (4, 97, 131), (2, 33, 40))
    hu = [rng.integers(-1024, 3072, shape).astype(np.int16) for shape in shapes]
    return [{"hu": hu[0], "ts": ts}, {"hu": hu[1], "ts": ts, "rex": rex, "labels": {"a": 1}}, {"hu": hu[2]}]


def samples_of(slabs_of, **changes) -> list[dict]:
    slabs = slabs_of(scans(), RandSlabMultiCrop(32, 16, patch_size_px=8), **changes)
    return [slabs[place] for place in range(3)]


def test_pixels_of_each_sample_are_found_by_the_sides_of_its_boxes(slabs_of):
    samples = samples_of(slabs_of)
    batch = collate_views(samples, num_global=2, sizes_px=(32, 16), patch_size_px=8)
    for group, views in (("global", slice(0, 2)), ("local", slice(2, None))):
        areas = batch["boxes"][:, views, 3].long().square().sum(1).tolist()
        for part, sample in zip(batch[f"{group}_pixels"].split(areas), samples, strict=True):
            np.testing.assert_array_equal(part.numpy(), sample[f"{group}_pixels"])


def test_planes_are_numbered_through_after_an_empty_one(slabs_of):
    samples = samples_of(slabs_of)
    batch = collate_views(samples, num_global=2, sizes_px=(32, 16), patch_size_px=8)
    for mask, dtype in (("ts", torch.uint8), ("rex", torch.int16)):
        planes = batch[f"{mask}_planes"]
        assert planes.dtype == dtype
        assert not planes[0].any()
        assert len(planes) == 1 + sum(len(sample[f"{mask}_planes"]) for sample in samples)
        for numbers, sample in zip(batch[f"{mask}_plane"], samples, strict=True):
            for number, own in zip(numbers.tolist(), sample[f"{mask}_plane"], strict=True):
                assert (number == 0) == (own < 0)
                if number:
                    np.testing.assert_array_equal(planes[number], sample[f"{mask}_planes"][own])


def test_facts_are_stacked_and_whole_numbers_stay_off_the_device(slabs_of):
    samples = samples_of(slabs_of)
    batch = collate_views(samples, num_global=2, sizes_px=(32, 16), patch_size_px=8)
    assert batch["volume"] == [sample["volume"] for sample in samples]
    assert batch["position"].tolist() == [0, 1, 2]
    assert batch["position"].dtype == torch.int64
    assert batch["has_rex"].dtype == torch.bool
    assert batch["labels"].tolist() == [sample["labels"].tolist() for sample in samples]
    assert batch["labels"].dtype == torch.int8
    assert batch["shape"].tolist() == [sample["shape"].tolist() for sample in samples]
    assert (batch["num_global"], batch["sizes_px"]) == (2, [32, 16])
    sides = np.stack([sample["boxes"][:, 3] for sample in samples])
    assert batch["largest_px"] == [sides[:, :2].max(), sides[:, 2:].max()]


def test_a_batch_without_masks_has_no_planes(slabs_of):
    batch = collate_views(samples_of(slabs_of, with_masks=False), 2, (32, 16), 8)
    assert not {"ts_planes", "ts_plane", "rex_planes", "rex_plane", "most_cells"} & batch.keys()


@pytest.fixture
def slabs(slabs_of) -> SlabViews:
    """Slabs of slices of different sizes."""
    rng = np.random.default_rng(0)
    hu = [rng.integers(-1024, 3072, (z, 20 + z, 40)).astype(np.int16) for z in (3, 8, 5, 6, 2)]
    ts = rng.integers(0, 2, (8, 128, 128)).astype(np.uint8)
    scans = [{"hu": one, "ts": ts[: len(one)]} for one in hu]
    return slabs_of(scans, RandSlabMultiCrop(16, 8, patch_size_px=8), slab_mm=2.0)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return one == other
    return torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan())


def steps(slabs: SlabViews, number: int, start_step: int = 0, **options: Any) -> list[dict]:
    loader = StepLoader(slabs, StepBatches(3, rank=1, world_size=2), **options)
    loader.batch_sampler.start_step = start_step
    return list(islice(loader, number))


def test_workers_give_the_batches_of_a_single_process(slabs):
    assert all(map(equal, steps(slabs, 7), steps(slabs, 7, num_workers=2)))


def test_a_run_goes_on_at_any_step_where_an_unbroken_one_is(slabs):
    unbroken = steps(slabs, 9)
    for start in range(7):
        assert all(map(equal, steps(slabs, 9 - start, start_step=start), unbroken[start:]))
    assert not equal(unbroken[0], unbroken[1])


def test_an_iteration_starts_anew(slabs):
    loader = StepLoader(slabs, StepBatches(2, 0, 1, start_step=3), num_workers=1)
    first, again = (list(islice(loader, 3)) for _ in range(2))
    assert all(map(equal, first, again))


def test_a_signal_to_the_trainers_group_leaves_its_workers_alone(slabs):
    loader = StepLoader(slabs, StepBatches(3, rank=0, world_size=1), num_workers=1)
    batches = iter(loader)
    next(batches)
    [worker] = multiprocessing.active_children()
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)


def test_batches_that_outgrow_the_shared_memory_are_refused_before_the_workers_start(slabs, monkeypatch):
    tensors = [
        [tensor for tensor in batch.values() if isinstance(tensor, torch.Tensor)]
        for batch in steps(slabs, 60)
    ]
    of_batch = np.mean([sum(tensor.nbytes for tensor in batch) for batch in tensors])
    free = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    options = {"num_workers": 2, "prefetch_factor": 4}
    needed = of_batch * (2 * 4 + 1) * 8
    monkeypatch.setattr("ignite.distributed.get_nproc_per_node", lambda: 8)
    free[step_loader.SHARED_MEMORY] = 1.5 * needed
    steps(slabs, 0, **options)
    free[step_loader.SHARED_MEMORY] = 0.5 * needed
    with pytest.raises(ValueError, match=r"num_workers must leave room in .*, got 2: .* 8 ranks take .* GB"):
        steps(slabs, 0, **options)
    steps(slabs, 1)  # without workers there is none
    monkeypatch.setattr(step_loader, "SHARED_MEMORY", Path("/nowhere"))
    steps(slabs, 0, **options)
