from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from common.shards.shards import ShardSet
from common.shards.writer import write_shard
from data_prep.hu_stats import (
    LOWEST_HU,
    NUM_BINS,
    Counts,
    VolumeTask,
    count_volume,
    count_volumes,
    foreground,
    hu_statistics,
    sample_volumes,
)
from tests.noise_volume import noise_volume


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def body(seed: int, num_slices: int, height: int = 40, width: int = 46) -> np.ndarray:
    """Noisy ellipses of tissue with a hole of air, on air, with a speck that the opening drops."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1024, -700, (num_slices, height, width))
    y, x = np.mgrid[:height, :width]
    for plane in hu:
        reach = ((y - height / 2) / (height / 2 - 5)) ** 2 + ((x - width / 2) / (width / 2 - 4)) ** 2
        tissue = (reach < 1) & (reach > 0.25)
        plane[tissue] = rng.integers(-400, 3072, tissue.sum())
        plane[2, 2] = 100
    return hu.astype(np.int16)


CTS = {f"train_{n}_a_1": body(n, num_slices=2 + n) for n in (1, 2, 3, 10)}


def write(folder: Path, cts: dict[str, np.ndarray], shards: list[list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, names in enumerate(shards):
        volumes = [noise_volume(name, ts=False, ct=cts[name]) for name in names]
        write_shard(folder / f"train-{number:06d}.tar", volumes)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    names = list(CTS)
    return ShardSet(write(tmp_path_factory.mktemp("shards"), CTS, [names[:3], names[3:]]), "train")


def foreground_by_hand(hu: np.ndarray) -> np.ndarray:
    """The rule by scipy's primitives one by one: threshold, 2 erosions, 2 dilations, flood from outside."""
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    mask = hu > -500
    for step in (ndimage.binary_erosion, ndimage.binary_erosion):
        mask = step(mask, cross)
    for step in (ndimage.binary_dilation, ndimage.binary_dilation):
        mask = step(mask, cross)
    air, _ = ndimage.label(np.pad(~mask, 1, constant_values=True), cross)
    return (air != air[0, 0])[1:-1, 1:-1]


def voxels(volumes: dict[str, np.ndarray]) -> np.ndarray:
    planes = [plane for ct in volumes.values() for plane in ct]
    return np.concatenate([plane[foreground_by_hand(plane)] for plane in planes]).astype(np.float64)


def test_statistics_are_those_of_all_foreground_voxels_put_together(shards, dask) -> None:
    counts, failed = count_volumes(dask, sample_volumes(shards, 1000, seed=42, slice_stride=1), quiet)
    assert failed == {}
    statistics, expected = hu_statistics(counts), voxels(CTS)
    assert statistics.num_foreground == len(expected)
    assert statistics.mean_hu == pytest.approx(expected.mean(), rel=1e-12)
    assert statistics.std_hu == pytest.approx(expected.std(), rel=1e-12)
    for percent in (0.05, 0.5, 50, 99.5):
        assert statistics.percentiles_hu[percent] == pytest.approx(np.percentile(expected, percent), abs=1e-9)
    size = sum(ct.size for ct in CTS.values())
    assert (counts.num_slices, counts.num_voxels) == (sum(map(len, CTS.values())), size)
    assert statistics.foreground_share == len(expected) / size
    assert statistics.highest_share == (expected == 3071).mean()
    assert statistics.lowest_share == (expected == -1024).mean()


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_of_few_voxels_are_numpys(seed) -> None:
    rng = np.random.default_rng(seed)
    values = rng.choice(rng.integers(-1024, 3072, 4), size=1 + 3 * seed)
    counts = Counts(np.bincount(values - LOWEST_HU, minlength=NUM_BINS), 1, 100)
    for percent, hu in hu_statistics(counts).percentiles_hu.items():
        assert hu == pytest.approx(np.percentile(values, percent), abs=1e-9)


def test_statistics_stay_exact_for_more_voxels_than_a_float_can_count() -> None:
    histogram = np.zeros(NUM_BINS, np.int64)
    histogram[[1024 - 1, 1024, 1024 + 1]] = 2**56 + 5, 1, 2**56 + 5
    statistics = hu_statistics(Counts(histogram, 1, 2**58))
    assert statistics.mean_hu == 0
    assert statistics.std_hu == pytest.approx(1, rel=1e-12)


def test_foreground_is_the_stated_rule_also_at_the_border() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = ndimage.gaussian_filter(rng.normal(size=(37, 41)), 3)
        hu = np.where(noise > np.quantile(noise, 0.4), 0, -1000)
        np.testing.assert_array_equal(foreground(hu), foreground_by_hand(hu))
    assert not foreground(np.full((20, 20), -500)).any()
    assert foreground(np.full((20, 20), -499)).any()


def test_a_stride_takes_every_so_many_slices_from_the_feet(shards) -> None:
    task = next(t for t in sample_volumes(shards, 9, seed=0, slice_stride=5) if t.volume == "train_10_a_1")
    counts = count_volume(task)
    expected = voxels({"": CTS["train_10_a_1"][[0, 5, 10]]})
    assert counts.num_slices == 3
    assert hu_statistics(counts).mean_hu == pytest.approx(expected.mean(), rel=1e-12)


def test_the_sample_depends_on_the_seed_and_not_on_how_volumes_lie_in_shards(tmp_path) -> None:
    names = list(CTS)
    sets = [
        ShardSet(write(tmp_path / name, CTS, layout), "train")
        for name, layout in (("a", [names]), ("b", [names[2:], names[1::-1]]))
    ]
    samples = [
        [[task.volume for task in sample_volumes(shards, 2, seed, 1)] for seed in range(8)] for shards in sets
    ]
    assert samples[0] == samples[1]
    assert all(len(set(sample)) == 2 for sample in samples[0])
    assert len({tuple(sample) for sample in samples[0]}) > 1


@pytest.mark.parametrize(("volumes", "stride", "name"), [(0, 1, "num_volumes"), (1, 0, "slice_stride")])
def test_a_sample_of_nothing_is_refused(shards, volumes, stride, name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        sample_volumes(shards, volumes, 42, stride)


@pytest.mark.parametrize("hu", [-1025, 3072])
def test_hu_that_shards_do_not_store_are_refused(hu, tmp_path) -> None:
    ct = body(0, 2)
    ct[1, 20, 5] = hu
    write(tmp_path, {"train_1_a_1": ct}, [["train_1_a_1"]])
    task = VolumeTask(str(tmp_path / "train-000000.tar"), "train_1_a_1", 1)
    with pytest.raises(ValueError, match=rf"CT must lie within -1024..3071 HU, got .*{hu}.* 'train_1_a_1'"):
        count_volume(task)


def test_air_alone_has_no_statistics() -> None:
    message = "No foreground above -500 HU in 3 slices"
    with pytest.raises(ValueError, match=message):
        hu_statistics(Counts(np.zeros(NUM_BINS, np.int64), 3, 100))
