import numpy as np
import pytest

from common.cohort.cohort import load_labels
from common.shards.codec import encode_mask
from common.shards.writer import VolumeSlices, write_shard
from data_prep.pos_weights import (
    MaskCounts,
    class_weights,
    count_shard,
    count_shards,
    write_weights,
)
from tests.noise_volume import noise_volume

NUM_TS, NUM_REX = 118, 14


def volume(name: str, num_slices: int, with_ts: bool = True, annotated: bool = False) -> VolumeSlices:
    """A volume whose first slice has no organ and whose last has no finding."""
    rng = np.random.default_rng(num_slices)
    ts = (rng.integers(0, NUM_TS, (num_slices, 128, 128)) * (rng.random((128, 128)) < 0.3)).astype(np.uint8)
    ts[ts == 77] = 0
    ts[0] = 0
    rex = np.zeros((num_slices, 128, 128), np.uint16)
    for bit in range(NUM_REX - 1):
        rex |= (rng.random(rex.shape) < 0.001 * bit).astype(np.uint16) << bit
    rex[-1] = 0
    masks = {"ts": ts if with_ts else None, "rex": rex if annotated else None}
    return noise_volume(name, num_slices)._replace(**masks)


SHARDS = {
    "train-000000.tar": [volume("a", 2), volume("b", 4, with_ts=False), volume("c", 3)],
    "train-000001.tar": [volume("d", 5)],
    "train-rex-000000.tar": [volume("e", 6, annotated=True), volume("f", 7, with_ts=False, annotated=True)],
}
VOLUMES = [volume for volumes in SHARDS.values() for volume in volumes]


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    for name, volumes in SHARDS.items():
        write_shard(folder / name, volumes)
    return [str(folder / name) for name in SHARDS]


def test_frequencies_are_shares_of_the_cells_of_volumes_that_have_masks(shards, dask) -> None:
    totals, failed = count_shards(dask, shards, quiet)
    assert failed == {}
    ts = np.concatenate([volume.ts for volume in VOLUMES if volume.ts is not None])
    rex = np.concatenate([volume.rex for volume in VOLUMES if volume.rex is not None])
    for name, masks, present in (
        ("totalsegmentator", ts, [ts == k for k in range(NUM_TS)]),
        ("rexgroundingct", rex, [(rex & 2**k) > 0 for k in range(NUM_REX)]),
    ):
        assert totals[name].num_cells == masks.size
        weights = class_weights(name, totals[name])
        assert [weight.cells for weight in weights] == [int(mask.sum()) for mask in present]
        np.testing.assert_allclose([weight.frequency for weight in weights], [m.mean() for m in present])
    assert totals["totalsegmentator"][2:] == (4, 2)
    assert totals["rexgroundingct"][2:] == (2, 4)


def test_a_weight_is_one_over_the_frequency_and_at_most_1000() -> None:
    cells = np.array([100, 5, 4, 3, 0, *[1] * 9])
    weights = class_weights("rexgroundingct", MaskCounts(cells, 4000, 1, 0))
    assert [weight.weight_by_frequency for weight in weights[:5]] == [40, 800, 1000, 1000, 1000]
    assert [weight.pos_weight for weight in weights[:5]] == [40, 800, 1000, 1000, 1000]
    assert weights[0].label.pos_weight == 800


def test_weights_that_were_set_to_1_by_hand_stay_1() -> None:
    """The authors' 26: background and what lies outside of a chest."""
    weights = class_weights("totalsegmentator", MaskCounts(np.full(NUM_TS, 10), 2000, 1, 0))
    by_hand = [weight.label.name for weight in weights if weight.pos_weight == 1]
    assert len(by_hand) == 26
    assert {"background", "urinary_bladder", "vertebrae_L3", "femur_left", "brain", "skull"} <= set(by_hand)
    assert {weight.weight_by_frequency for weight in weights} == {200}
    assert {weight.pos_weight for weight in weights} == {1, 200}


def test_the_table_can_take_the_place_of_the_label_list(tmp_path, monkeypatch) -> None:
    weights = class_weights("rexgroundingct", MaskCounts(np.arange(14) * 7, 2**14, 1, 0))
    write_weights(tmp_path / "rexgroundingct.csv", weights)
    monkeypatch.setattr("common.cohort.cohort.LABEL_LISTS", tmp_path)
    assert [(x.index, x.name, x.code) for x in load_labels("rexgroundingct")] == [
        (weight.label.index, weight.label.name, weight.label.code) for weight in weights
    ]
    read = [label.pos_weight for label in load_labels("rexgroundingct")]
    assert read == pytest.approx([weight.pos_weight for weight in weights], rel=1e-5)


def test_no_masks_give_no_weights() -> None:
    message = "None of 3 volumes has masks of rexgroundingct"
    with pytest.raises(ValueError, match=message):
        class_weights("rexgroundingct", MaskCounts(np.zeros(14, np.int64), 0, 0, 3))


def test_a_damaged_shard_is_left_out_and_named(tmp_path, dask) -> None:
    paths = [tmp_path / name for name in ("train-000000.tar", "train-000001.tar")]
    for path in paths:
        write_shard(path, SHARDS[path.name])
    content = paths[0].read_bytes()
    png = content.index(b"\x89PNG", content.index(b"a_0001.ts.png"))
    paths[0].write_bytes(content[:png] + bytes(40) + content[png + 40 :])
    totals, failed = count_shards(dask, [str(path) for path in paths], quiet)
    assert list(failed) == [str(paths[0])]
    assert "is damaged at ts.png of sample 1" in failed[str(paths[0])]
    assert totals["totalsegmentator"].num_volumes == 1


def test_an_unknown_id_is_refused(tmp_path) -> None:
    shard = tmp_path / "train-000000.tar"
    ts = np.full((1, 128, 128), 117, np.uint8)
    write_shard(shard, [volume("a", 1)._replace(ts=ts)])
    right, wrong = encode_mask(ts[0]), encode_mask(ts[0] + 1)
    assert len(right) == len(wrong)
    shard.write_bytes(shard.read_bytes().replace(right, wrong))
    with pytest.raises(ValueError, match="ids must be below 118, got 118 in '.*train-000000.tar'"):
        count_shard(str(shard))
