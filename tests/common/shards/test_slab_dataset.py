"""Samples are a function of (seed, position), whichever rank or worker asks, in whatever order."""

import math
import multiprocessing
import os
import shutil
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from common.shards import slab_dataset
from common.shards.shards import ShardSet
from common.shards.slab_dataset import SlabViews, StepBatches, StepLoader, slab_num_slices, slab_starts
from common.shards.writer import write_shard
from common.transforms.multi_crop import GUIDED_BY_REX, UNGUIDED
from common.transforms.patch_masks import PatchMasks
from common.transforms.render_views import count_labels
from tests.common.conftest import multi_crop
from tests.noise_volume import noise_volume


class Volume(NamedTuple):
    """What SlabViews asks of a volume's entry."""

    volume: str
    num_slices: int
    spacing_mm: tuple[float, float, float] = (0.7, 0.7, 1.5)
    shape: tuple[int, int] = (29, 37)
    has_ts: bool = True
    has_rex: bool = False
    labels: dict[str, int] | None = None


class Shards:
    """Stands in for a ShardSet."""

    def __init__(self, volumes: list[Volume]) -> None:
        self.volumes = volumes
        self.slices_read: list[tuple[int, int]] = []

    def read_slab(self, volume_id: int, z0: int, n: int) -> "Slab":
        assert 0 <= z0 < z0 + n <= self.volumes[volume_id].num_slices
        return Slab(self, volume_id, z0, n)


class Slab(NamedTuple):
    """Slice z of volume v is filled with 100 v + z; every fourth shows no organ, all the same finding."""

    shards: Shards
    volume_id: int
    z0: int
    n: int

    def read_ct(self, z: int) -> np.ndarray:
        assert 0 <= z < self.n
        self.shards.slices_read.append((self.volume_id, self.z0 + z))
        shape = self.shards.volumes[self.volume_id].shape
        return np.full(shape, 100 * self.volume_id + self.z0 + z, np.int16)

    def read_ts(self) -> np.ndarray | None:
        mask = np.zeros((self.n, 128, 128), np.uint8)
        mask[:, 32:96, 32:96] = 51
        mask[np.arange(self.z0, self.z0 + self.n) % 4 == 3] = 0
        return mask if self.shards.volumes[self.volume_id].has_ts else None

    def read_rex(self) -> np.ndarray | None:
        mask = np.zeros((self.n, 128, 128), np.uint16)
        mask[:, 56:64, 72:80] = 1 << 13
        return mask if self.shards.volumes[self.volume_id].has_rex else None


def cohort(number: int, num_slices: int = 17, every_rex: int = 5) -> list[Volume]:
    return [Volume(f"v{i}", num_slices + i % 3, has_rex=i % every_rex == 0) for i in range(number)]


def slab_views(volumes: list[Volume] | Any, **changes: Any) -> SlabViews:
    shards = Shards(volumes) if isinstance(volumes, list) else volumes
    arguments = {"slab_mm": 12.0, "rex_fraction": 0.2, "seed": 0, "with_masks": True}
    return SlabViews(**{"shards": shards, "multi_crop": multi_crop(16, 8, 8), **arguments, **changes})


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    if isinstance(one, torch.Tensor):
        return equal(one.numpy(), other.numpy())
    return one == other


def same_samples(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


# Which slab


@pytest.mark.parametrize("fraction", [0.2, 0.3, 1 / 3, 0.0, 1.0])
def test_share_of_rex_slabs_is_exact_over_any_stretch(fraction):
    views = slab_views(cohort(20), rex_fraction=fraction)
    is_rex = [views.shards.volumes[views.slab_of(i)[0]].has_rex for i in range(1500)]
    counts = np.concatenate([[0], np.cumsum(is_rex)])
    for length in (5, 64, 500):
        shares = counts[length:] - counts[:-length]
        assert set(shares.tolist()) <= {math.floor(fraction * length), math.ceil(fraction * length)}


def test_position_draws_rex_where_the_running_count_steps():
    views = slab_views(cohort(20), rex_fraction=0.2)
    assert [i for i in range(21) if views.shards.volumes[views.slab_of(i)[0]].has_rex] == [4, 9, 14, 19]


def test_every_slab_of_a_pool_comes_once_a_pass_in_a_new_order():
    views = slab_views(cohort(6, every_rex=3), rex_fraction=0.2)
    pools: dict[bool, list] = {True: [], False: []}
    for i in range(400):
        slab = views.slab_of(i)
        pools[views.shards.volumes[slab[0]].has_rex].append(slab)
    expected = {False: Counter(), True: Counter()}
    for volume, entry in enumerate(views.shards.volumes):
        for start in range(0, entry.num_slices, 8):
            expected[entry.has_rex][volume, min(start, entry.num_slices - 8), 8] += 1
    for has_rex, drawn in pools.items():
        size = expected[has_rex].total()
        passes = [drawn[k : k + size] for k in range(0, len(drawn) - size + 1, size)]
        assert len(passes) >= 3
        assert all(Counter(one) == expected[has_rex] for one in passes)
        assert passes[0] != passes[1] != passes[2]


def test_natural_share_is_one_pool_of_all_slabs():
    views = slab_views(cohort(10), rex_fraction=None)
    number = len(views.slab_volumes)
    drawn = [views.slab_of(i) for i in range(number)]
    assert len(set(drawn)) == number
    assert {volume for volume, _, _ in drawn} == set(range(10))


@pytest.mark.parametrize(("has_rex", "named"), [(True, "All volumes have"), (False, "No volume has")])
def test_empty_pool_leaves_its_draws_to_the_other_and_says_so_once(has_rex, named, caplog):
    views = slab_views([Volume(f"v{i}", 16, has_rex=has_rex) for i in range(7)])
    drawn = [views.slab_of(i) for i in range(14)]
    assert len(set(drawn)) == 14
    assert [record.message for record in caplog.records] == [
        f"{named} ReX annotation: rex_fraction 0.2 has no effect."
    ]


def test_slab_length_follows_each_volumes_spacing_and_size():
    volumes = [Volume(f"v{i}", 40, (0.7, 0.7, mm)) for i, mm in enumerate((0.5, 1.0, 3.0, 4.8))]
    views = slab_views([*volumes, Volume("short", 5, (0.7, 0.7, 1.0))], rex_fraction=None)
    for i in range(200):
        volume, first, length = views.slab_of(i)
        entry = views.shards.volumes[volume]
        assert length == min(slab_num_slices(entry.spacing_mm[2], 12.0), entry.num_slices)
        assert 0 <= first <= entry.num_slices - length


def test_slab_of_0_mm_is_one_slice():
    views = slab_views(cohort(3), slab_mm=0)
    assert {views.slab_of(i)[2] for i in range(60)} == {1}
    assert (views[7]["boxes"][:, 0] == 0).all()


def test_seed_changes_slabs_and_views():
    one, other = slab_views(cohort(20)), slab_views(cohort(20), seed=1)
    assert [one.slab_of(i) for i in range(20)] != [other.slab_of(i) for i in range(20)]
    assert (one[0]["boxes"] != other[0]["boxes"]).any()


@pytest.mark.parametrize(("number", "steps", "most"), [(500, 400, 6), (47_000, 60, 3)])
def test_no_batch_holds_more_than_a_few_slabs_of_one_scan(number, steps, most):
    """The released loader's 100-slab buffer fills a batch of 64 from 4 to 7 scans."""
    rng = np.random.default_rng(0)
    heights = rng.integers(180, 600, number)
    spacings = rng.choice([0.5, 0.75, 1.0, 1.5, 2.0], number)
    volumes = [
        Volume(f"v{i}", int(heights[i]), (0.7, 0.7, float(spacings[i])), has_rex=i % 16 == 0)
        for i in range(number)
    ]
    views = slab_views(volumes)
    batches = [[views.slab_of(step * 64 + i)[0] for i in range(64)] for step in range(steps)]
    assert max(max(Counter(batch).values()) for batch in batches) <= most
    assert np.mean([len(set(batch)) for batch in batches]) > 58


# The sample


def test_sample_has_the_stated_entries():
    sample = slab_views(cohort(10))[4]
    shapes = {name: (part.shape, part.dtype) for name, part in sample.items() if isinstance(part, np.ndarray)}
    sides = sample["boxes"][:, 3].astype(int)
    used = set(sample["boxes"][:, 0].tolist())
    filled = sum((sample["first_slice"] + z) % 4 != 3 for z in used)
    assert shapes == {
        "global_pixels": (((sides[:2] ** 2).sum(),), np.int16),
        "local_pixels": (((sides[2:] ** 2).sum(),), np.int16),
        "ts_planes": ((filled, 128, 128), np.uint8),
        "ts_plane": ((10,), np.int64),
        "rex_planes": ((len(used), 128, 128), np.int16),
        "rex_plane": ((10,), np.int64),
        "boxes": ((10, 4), np.int32),
        "guide": ((10,), np.int8),
        "points": ((10, 2), np.float32),
        "flips": ((10,), np.bool_),
        "gamma": ((10,), np.float32),
        "blur_sigma": ((10,), np.float32),
        "shape": ((2,), np.int32),
        "labels": ((0,), np.int8),
        "spacing_mm": ((3,), np.float32),
    }
    others = {name: sample[name] for name in sample.keys() - shapes.keys()}
    volume, first, _ = slab_views(cohort(10)).slab_of(4)
    expected = {"volume": f"v{volume}", "first_slice": first, "position": 4, "has_ts": True, "has_rex": True}
    assert others == expected
    assert {name: type(value) for name, value in others.items()} == {k: type(v) for k, v in expected.items()}
    assert (sample["guide"] == GUIDED_BY_REX).any()
    assert sample["shape"].tolist() == [29, 37]
    np.testing.assert_allclose(sample["spacing_mm"], (0.7, 0.7, 1.5))


def test_crops_show_the_slices_of_their_boxes():
    views = slab_views(cohort(10))
    for place in range(10):
        sample = views[place]
        volume = int(sample["volume"][1:])
        pixels = np.concatenate([sample["global_pixels"], sample["local_pixels"]])
        ends = (sample["boxes"][:, 3].astype(int) ** 2).cumsum()
        expected = 100 * volume + sample["first_slice"] + sample["boxes"][:, 0]
        assert pixels[ends - 1].tolist() == expected.tolist()
        assert len(pixels) == ends[-1]


def test_planes_are_those_under_the_views_and_empty_ones_are_left_out():
    views = slab_views([Volume("v0", 24, (0.7, 0.7, 1.0), has_rex=True)], rex_fraction=None)
    empty = 0
    for place in range(8):
        sample = views[place]
        slab = views.shards.read_slab(0, sample["first_slice"], 12)
        for name, stored in (("ts", slab.read_ts()), ("rex", slab.read_rex())):
            for z, plane in zip(sample["boxes"][:, 0], sample[f"{name}_plane"], strict=True):
                shown = sample[f"{name}_planes"][plane] if plane >= 0 else np.zeros((128, 128))
                np.testing.assert_array_equal(shown, stored[z])
                empty += plane < 0
    assert empty > 5


def test_only_needed_slices_are_read_and_each_once():
    views = slab_views([Volume("v0", 90, (0.7, 0.7, 0.3))], rex_fraction=None)
    sample = views[3]
    expected = {(0, sample["first_slice"] + int(z)) for z in sample["boxes"][:, 0]}
    assert sorted(views.shards.slices_read) == sorted(expected)


def test_masks_guide_even_where_the_sample_leaves_them_out():
    with_masks, without = (slab_views(cohort(10), with_masks=wanted)[4] for wanted in (True, False))
    masks = {f"{source}_plane{s}" for source in ("ts", "rex") for s in ("", "s")}
    assert with_masks.keys() - without.keys() == masks
    assert same_samples({k: v for k, v in with_masks.items() if k not in masks}, without)


def test_volume_without_masks_is_unguided_and_has_no_planes():
    sample = slab_views([Volume("v0", 9, has_ts=False)], rex_fraction=None)[0]
    assert (sample["has_ts"], sample["has_rex"]) == (False, False)
    assert (sample["guide"] == UNGUIDED).all()
    assert sample["ts_planes"].shape == sample["rex_planes"].shape == (0, 128, 128)
    assert (sample["ts_plane"] == -1).all()


def test_labels_are_in_the_order_of_their_names_and_minus_one_where_a_volume_has_none():
    labelled = [
        Volume("v0", 8, labels={"Nodule": 1, "Effusion": 0}),
        Volume("v1", 8),
        Volume("v2", 8, labels={"Effusion": 1, "Nodule": 0}),
        Volume("v3", 8, labels={"Nodule": 1, "Mass": 1}),
    ]
    views = slab_views(labelled, rex_fraction=None)
    assert views.label_names == ["Nodule", "Effusion", "Mass"]
    found = {sample["volume"]: sample["labels"].tolist() for sample in map(views.__getitem__, range(4))}
    assert found == {"v0": [1, 0, -1], "v1": [-1, -1, -1], "v2": [0, 1, -1], "v3": [1, -1, 1]}


# Determinism


def test_sample_depends_on_position_alone_not_on_order():
    forward, backward = slab_views(cohort(10)), slab_views(cohort(10))
    items = {i: backward[i] for i in reversed(range(12))}
    for i in range(12):
        assert same_samples(forward[i], items[i])
        assert same_samples(forward[i], forward[i])
    assert not same_samples(forward[0], forward[1])


def test_positions_share_no_randomness_even_on_one_slab():
    views = slab_views([Volume("v0", 8, shape=(512, 512))], rex_fraction=None)
    gammas = np.concatenate([views[i]["gamma"] for i in range(40)])
    drawn = gammas[gammas != 1]
    assert len(drawn) > 250
    assert len(np.unique(drawn)) == len(drawn)


def test_samples_do_not_depend_on_global_random_state():
    views = slab_views(cohort(10))
    np.random.seed(1)  # noqa: NPY002 (the state that must not matter)
    one = views[2]
    torch.manual_seed(3)
    np.random.seed(2)  # noqa: NPY002 (the state that must not matter)
    assert same_samples(one, views[2])


def test_ranks_draw_different_views_of_different_slabs():
    views = slab_views(cohort(20, num_slices=64))
    batches = [next(iter(StepBatches(8, rank=rank, world_size=4))) for rank in range(4)]
    drawn = [[views[place] for place in batch] for batch in batches]
    slabs = [(sample["volume"], sample["first_slice"]) for samples in drawn for sample in samples]
    assert len(set(slabs)) == 32
    gammas = np.concatenate([sample["gamma"] for samples in drawn for sample in samples])
    assert len(np.unique(gammas[gammas != 1])) == (gammas != 1).sum() > 200


def test_batches_of_ranks_together_are_those_of_one_rank():
    alone = islice(StepBatches(15, rank=0, world_size=1), 4)
    ranks = zip(*(islice(StepBatches(5, rank=rank, world_size=3), 4) for rank in range(3)), strict=True)
    for step, (whole, parts) in enumerate(zip(alone, ranks, strict=True)):
        assert whole == [position for part in parts for position in part]
        assert whole == list(range(step * 15, step * 15 + 15))


# Through real shards


def real_shards(folder: Path) -> ShardSet:
    for name, has_rex in (("train-000000.tar", False), ("train-rex-000000.tar", True)):
        volumes = []
        for number in range(2):
            ts = np.zeros((11, 128, 128), np.uint8)
            ts[:, 30:90, 40:80] = 51
            rex = np.zeros((11, 128, 128), np.uint16)
            rex[2:9, 50:60, 70:75] = 1 << 13
            scan = f"train_{number}_{'b' if has_rex else 'a'}_1"
            made = noise_volume(scan, 11, (64, 48), spacing_mm=(0.7, 0.7, 2.0))
            volumes.append(made._replace(ts=ts, rex=rex if has_rex else None))
        write_shard(folder / name, volumes)
    return ShardSet(folder, "train")


def test_real_shards_give_the_views_of_their_volumes(tmp_path):
    shards = real_shards(tmp_path)
    views = slab_views(shards, multi_crop=multi_crop(48, 16, 8, global_scale=(1, 1)))
    batch = next(iter(StepLoader(views, StepBatches(5, rank=0, world_size=1), num_workers=1)))
    assert batch["has_rex"].tolist() == [False, False, False, False, True]
    labels = count_labels(batch, "presence")["local"]
    assert labels["ts_cls"][..., 51].any()
    assert labels["rex_cls"][4, :, 13].any()
    assert not labels["rex_cls"][:4].any()
    names = [entry.volume for entry in shards.volumes]
    pixels = batch["global_pixels"].view(5, 2, 48, 48)
    for i in range(5):
        z, top, left, side = batch["boxes"][i, 0].tolist()
        slab = shards.read_slab(names.index(batch["volume"][i]), int(batch["first_slice"][i]) + z, 1)
        hu = slab.read_ct(0)
        np.testing.assert_array_equal(pixels[i, 0], hu[top : top + side, left : left + side])


# Refusals


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rex_fraction must be between 0 and 1, or None .*got 1.2"):
        slab_views(cohort(3), rex_fraction=1.2)
    with pytest.raises(ValueError, match="shards must hold at least one volume, got none"):
        slab_views([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "batch_size must be positive, got 0"),
        ((2, 3, 3), r"rank must be in \[0, world_size\), got 3 and 3"),
        ((2, -1, 3), r"rank must be in \[0, world_size\), got -1 and 3"),
    ],
)
def test_batches_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatches(*arguments)


# Masks


def test_masks_belong_to_the_slab_and_a_batch_says_where_they_are() -> None:
    masks = PatchMasks(
        **{"global_size_px": 16, "patch_size_px": 8, "num_global": 2, "seed": 0},
        **{"mask_sample_prob": 0.5, "mask_ratio": (0.3, 0.6)},
    )
    slabs, plain = slab_views(cohort(10), patch_masks=masks), slab_views(cohort(10))
    places = range(4, 9)
    batch, unmasked = (views.collate([views[place] for place in places]) for views in (slabs, plain))
    expected = np.stack([masks.draw(place) for place in places])
    assert np.array_equal(batch["masks"].numpy(), expected)
    found = batch["masked_places"][batch["masked_weights"] > 0]
    assert np.array_equal(found.numpy(), np.flatnonzero(expected))
    assert len(batch["masked_places"]) == masks.most_masked(5)
    # views are those of a run without masks
    assert all(equal(batch[name], unmasked[name]) for name in unmasked)
    assert batch.keys() - unmasked.keys() == {"masks", "masked_places", "masked_weights"}


def test_length_is_the_decimal_quotient_rounded_half_up():
    for hundredths in range(50, 601):
        exact = Decimal(1200) / Decimal(hundredths)
        assert slab_num_slices(hundredths / 100, 12.0) == exact.quantize(Decimal(1), ROUND_HALF_UP)


def test_half_rounds_up_for_a_float32_header_too():
    assert float(np.float32(4.8)) > 4.8
    assert slab_num_slices(float(np.float32(4.8)), 12.0) == 3
    assert slab_num_slices(float(np.float32(0.8)), 0.4) == 1
    assert slab_num_slices(8.0, 12.0) == 2


def test_slab_has_at_least_one_slice():
    assert slab_num_slices(30.0, 12.0) == 1
    assert slab_num_slices(1.0, 0.0) == 1  # pure 2D


@pytest.mark.parametrize("spacing", [math.nan, 0.0, -1.0, math.inf])
def test_spacing_that_is_no_distance_is_refused_with_the_volume(spacing):
    with pytest.raises(
        ValueError,
        match=f"spacing_mm must be positive to cut 12.0 mm slabs, got {spacing} for volume 'train_1_a_1'",
    ):
        slab_num_slices(spacing, 12.0, "train_1_a_1")


@pytest.mark.parametrize("slab_mm", [-12.0, math.nan, math.inf])
def test_thickness_that_is_none_is_refused(slab_mm):
    with pytest.raises(ValueError, match=f"slab_mm must be positive, or 0 for single slices, got {slab_mm}"):
        slab_num_slices(1.0, slab_mm)


@pytest.mark.parametrize("num_slices", [1, 2, 11, 12, 13, 23, 24, 25, 97])
@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_slabs_cover_every_slice_at_full_length(num_slices, length):
    starts = slab_starts(num_slices, length)
    taken = min(length, num_slices)
    covered = {int(start) + i for start in starts for i in range(taken)}
    assert covered == set(range(num_slices))
    assert len(starts) == math.ceil(num_slices / length)
    assert len(set(starts.tolist())) == len(starts)


def test_slabs_tile_from_the_feet_and_the_last_ends_at_the_head():
    np.testing.assert_array_equal(slab_starts(24, 12), [0, 12])
    np.testing.assert_array_equal(slab_starts(25, 12), [0, 12, 13])
    np.testing.assert_array_equal(slab_starts(7, 12), [0])


@pytest.mark.parametrize(("num_slices", "length"), [(0, 12), (5, 0), (-3, 2)])
def test_empty_volumes_and_slabs_are_refused(num_slices, length):
    with pytest.raises(ValueError, match=f"must be positive, got {num_slices} and {length}"):
        slab_starts(num_slices, length)


# The loader


@pytest.fixture
def slabs(slabs_of) -> SlabViews:
    """Slabs of slices of different sizes."""
    rng = np.random.default_rng(0)
    hu = [rng.integers(-1024, 3072, (z, 20 + z, 40)).astype(np.int16) for z in (3, 8, 5, 6, 2)]
    ts = rng.integers(0, 2, (8, 128, 128)).astype(np.uint8)
    scans = [{"hu": one, "ts": ts[: len(one)]} for one in hu]
    return slabs_of(scans, multi_crop(16, 8, 8), slab_mm=2.0)


def steps(slabs: SlabViews, number: int, start_step: int = 0, **options: Any) -> list[dict]:
    loader = StepLoader(slabs, StepBatches(3, rank=1, world_size=2), **options)
    loader.batch_sampler.start_step = start_step
    return list(islice(loader, number))


def test_workers_give_the_batches_of_a_single_process(slabs):
    assert all(map(same_samples, steps(slabs, 7), steps(slabs, 7, num_workers=2)))


def test_a_run_goes_on_at_any_step_where_an_unbroken_one_is(slabs):
    unbroken = steps(slabs, 9)
    for start in range(7):
        assert all(map(same_samples, steps(slabs, 9 - start, start_step=start), unbroken[start:]))
    assert not same_samples(unbroken[0], unbroken[1])


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
    free[slab_dataset.SHARED_MEMORY] = 1.5 * needed
    steps(slabs, 0, **options)
    free[slab_dataset.SHARED_MEMORY] = 0.5 * needed
    with pytest.raises(ValueError, match=r"num_workers must leave room in .*, got 2: .* 8 ranks take .* GB"):
        steps(slabs, 0, **options)
    steps(slabs, 1)  # without workers there is none
    monkeypatch.setattr(slab_dataset, "SHARED_MEMORY", Path("/nowhere"))
    steps(slabs, 0, **options)
