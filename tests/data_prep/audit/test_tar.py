"""A small shard, damaged in one way at a time: one check must fail, and say where."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from common.shards.index import FIELDS, ShardIndex
from common.shards.writer import VolumeSlices, write_shard
from data_prep.audit.checks import Tally
from data_prep.audit.tar import Sample, check_order, read_samples


def volume(name: str, num_slices: int) -> VolumeSlices:
    rng = np.random.default_rng(num_slices)
    return VolumeSlices(
        volume=name,
        ct=rng.integers(-1024, 3072, (num_slices, 11, 13)).astype(np.int16),
        ts=np.zeros((num_slices, 128, 128), np.uint8),
        rex=None,
        spacing_mm=(0.7, 0.8, 1.5),
        original_shape=(13, 11, num_slices),
        original_axcodes="LPS",
        labels=None,
        split="train",
    )


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, ShardIndex]:
    path = tmp_path / "train-000000.tar"
    return path, write_shard(path, [volume("a", 4), volume("b_1", 3)])


def read(path: Path, index: ShardIndex) -> tuple[list[Sample], Tally]:
    tally = Tally()
    return list(read_samples(path, index, tally)), tally


def rewritten(path: Path, index: ShardIndex, order: list[int]) -> ShardIndex:
    """Write the tar's members in another order; the index follows them."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    offsets = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (members[k] for k in order):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            offsets[name] = tar.offset + tarfile.BLOCKSIZE
            tar.addfile(info, io.BytesIO(data))
    names = [f"{v}_{z:04d}" for v, n in (("a", 4), ("b_1", 3)) for z in range(n)]
    moved = np.array([[offsets.get(f"{name}.{field}", -1) for field in FIELDS] for name in names])
    return index._replace(member_offset=moved)


def test_a_whole_shard_passes_and_yields_its_slices_in_order(shard: tuple[Path, ShardIndex]) -> None:
    path, index = shard
    samples, tally = read(path, index)
    assert [(s.volume_id, s.z, s.row) for s in samples] == [
        *((0, z, z) for z in range(4)),
        *((1, z, 4 + z) for z in range(3)),
    ]
    assert all(sample.data.keys() == {"ct.blosc2", "ts.png", "json"} == sample.fields for sample in samples)
    assert not tally.failed
    assert (tally.checked["members"], tally.checked["checksums"], tally.checked["order"]) == (21, 21, 7)


@pytest.mark.parametrize("field", ["ct.blosc2", "ts.png", "json"])
def test_one_other_byte_fails_the_checksum_of_its_slice(field: str, shard: tuple[Path, ShardIndex]) -> None:
    path, index = shard
    data = bytearray(path.read_bytes())
    data[index.member_offset[5, FIELDS.index(field)] + 7] ^= 1
    path.write_bytes(data)
    samples, tally = read(path, index)
    assert tally.failed == {"checksums": 1}
    assert tally.offences["checksums"][0][1:] == (
        "b_1",
        f"slice 1: {field} has other bytes than were written",
    )
    assert field not in samples[5].data


def test_two_exchanged_slices_fail_the_order(shard: tuple[Path, ShardIndex]) -> None:
    path, index = shard
    order = [*range(3), *range(6, 9), *range(3, 6), *range(9, 21)]
    _, tally = read(path, rewritten(path, index, order))
    assert tally.failed.keys() == {"order"}
    assert tally.offences["order"][0][1:] == ("a", "slice 2 follows slice 0 in train-000000.tar")


def test_members_that_moved_without_their_index_are_noticed(shard: tuple[Path, ShardIndex]) -> None:
    path, index = shard
    rewritten(path, index, [2, 0, 1, *range(3, 21)])
    samples, tally = read(path, index)
    assert tally.failed == {"members": 3}
    assert "by the index, got" in tally.offences["members"][0].what
    assert samples[0].data == {}


def test_missing_and_foreign_members_are_noticed(shard: tuple[Path, ShardIndex]) -> None:
    path, index = shard
    shorter = rewritten(path, index, list(range(20)))
    _, tally = read(path, shorter)
    assert tally.failed == {"members": 1}
    assert tally.offences["members"][0][1:] == ("b_1", "slice 2: json is not in train-000000.tar")
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("b_1_0003.json"))
    _, tally = read(path, shorter)
    assert tally.failed == {"members": 2}
    assert "'b_1_0003.json' is not in the index" in tally.offences["members"][0].what


def test_a_broken_header_loses_what_follows(shard: tuple[Path, ShardIndex]) -> None:
    path, index = shard
    data = bytearray(path.read_bytes())
    data[index.member_offset[4, 0] - tarfile.BLOCKSIZE] ^= 255
    path.write_bytes(data)
    samples, tally = read(path, index)
    assert len(samples) == 4
    assert tally.failed == {"members": 9}


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["a_0000", "a_0001", "b_0000"], []),
        (["a_0001", "a_0002"], ["it begins with slice 1 in s"]),
        (["a_0000", "a_0002"], ["slice 2 follows slice 0 in s"]),
        (["a_0002", "a_0001", "a_0000"], ["it begins with slice 2", "slice 1 follows", "slice 0 follows"]),
        (["a_0000", "b_0000", "a_0001"], ["it goes on with slice 1 after another volume in s"]),
    ],
)
def test_order_is_judged_by_the_tar_alone(keys: list[str], what: list[str]) -> None:
    tally = Tally()
    check_order([f"{key}.{field}" for key in keys for field in ("ct.blosc2", "json")], "s", tally)
    found = [offence.what for offence in tally.offences.get("order", [])]
    assert len(found) == len(what)
    assert all(start in text for start, text in zip(what, found, strict=True))


def test_members_of_a_slice_that_lie_apart_are_noticed() -> None:
    tally = Tally()
    check_order(["a_0000.ct.blosc2", "a_0001.ct.blosc2", "a_0000.json", "a_0001.json"], "s", tally)
    assert tally.failed["order"] > 0
