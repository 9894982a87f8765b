import numpy as np
import pytest

from common.shards.index import ShardIndex
from common.shards.shards import write_shard
from common.shards.stored_slab import StoredSlab
from common.shards.volume import VolumeSlices
from common.shards.volume_entry import volume_entries

RNG = np.random.default_rng(0)
CT = RNG.integers(-1024, 3072, (7, 11, 13)).astype(np.int16)
TS = RNG.integers(1, 118, (7, 128, 128)).astype(np.uint8)
TS[3] = 0


def volume(name: str) -> VolumeSlices:
    return VolumeSlices(name, CT, TS, None, (0.7, 0.8, 1.5), (13, 11, 7), "LPS", None, "train")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ShardIndex]:
    shard = tmp_path_factory.mktemp("shards") / "train-000000.tar"
    index = write_shard(shard, [volume("a"), volume("b")])
    return shard.read_bytes(), index


def slab(stored: tuple[bytes, ShardIndex], fetched: list[tuple[int, int]], z0: int = 2) -> StoredSlab:
    tar, index = stored

    def fetch(start: int, size: int) -> bytes:
        fetched.append((start, size))
        return tar[start : start + size]

    return StoredSlab(volume_entries("some.tar", index)[1], index, z0, 3, fetch)


def test_only_what_is_asked_for_is_fetched(stored: tuple[bytes, ShardIndex]) -> None:
    fetched: list[tuple[int, int]] = []
    three = slab(stored, fetched)
    np.testing.assert_array_equal(three.read_ct(1), CT[3])
    assert len(fetched) == 1
    np.testing.assert_array_equal(three.read_ts(), TS[2:5])
    assert len(fetched) == 3  # the empty mask of slice 3 is known from the index
    assert three.read_rex() is None


def test_the_extent_holds_all_members_and_nothing_of_the_neighbours(stored: tuple[bytes, ShardIndex]) -> None:
    tar, _ = stored
    start, size = slab(stored, []).extent()
    run = tar[start : start + size]
    names = [f"b_{z:04d}.".encode() for z in range(7)]
    assert [name in run for name in names] == [False, False, True, True, True, False, False]
    first = tar.index(b"b_0002.ct.blosc2")
    assert start == first + 512  # the header of the first member is not needed


def test_damage_names_the_slice_of_the_volume(stored: tuple[bytes, ShardIndex]) -> None:
    broken = slab(stored, [])._replace(fetch=lambda start, size: bytes(size))
    with pytest.raises(ValueError, match=r"'some\.tar' is damaged at ct\.blosc2 of slice 4 of volume 'b'"):
        broken.read_ct(2)
    with pytest.raises(ValueError, match=r"damaged at ts\.png of slice 2 of volume 'b'.* Delete the shard"):
        broken.read_ts()
