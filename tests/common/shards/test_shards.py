import logging
import os
import pickle
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset

from common.ct.rejection import RejectedVolume
from common.shards import shards as shards_module
from common.shards.codec import VolumeSlices, decode_ct, decode_mask
from common.shards.index import ShardIndex, index_path, volume_entries
from common.shards.shards import ShardSet, StoredSlab, write_shard


def volume(name: str, num_slices: int, annotated: bool = False, with_ts: bool = True) -> VolumeSlices:
    rng = np.random.default_rng(sum(name.encode()))
    ts = rng.integers(0, 118, (num_slices, 128, 128)).astype(np.uint8)
    ts[0] = 0
    rex = rng.integers(0, 2**14, (num_slices, 128, 128)).astype(np.uint16)
    rex[-1] = 0
    return VolumeSlices(
        volume=name,
        ct=rng.integers(-1024, 3071, (num_slices, 17, 19)).astype(np.int16),
        ts=ts if with_ts else None,
        rex=rex if annotated else None,
        spacing_mm=(0.7, 0.8, 1.5 + num_slices),
        original_shape=(19, 17, num_slices),
        original_axcodes="LPS",
        labels={"x": num_slices % 2} if with_ts else None,
        split="train",
        source=f"dataset/{name}.nii.gz",
        source_sha256=f"{num_slices:064d}",
    )


FIRST = [volume("train_1_a_1", 5), volume("train_2_a_1", 3, with_ts=False)]
SECOND = [volume("train_3_a_1", 2)]
ANNOTATED = [
    volume("train_4_a_1", 7, annotated=True),
    volume("train_5_a_1", 4, annotated=True, with_ts=False),
]
IN_ORDER = [*FIRST, *SECOND, *ANNOTATED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_shard(path / "train-000000.tar", FIRST, plan="a plan")
    write_shard(path / "train-000001.tar", SECOND)
    write_shard(path / "train-rex-000000.tar", ANNOTATED)
    write_shard(path / "valid-000000.tar", [volume("valid_1_a_1", 2)._replace(split="valid")])
    return path


@pytest.fixture
def one_shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "train-000000.tar", FIRST)
    return tmp_path / "train-000000.tar"


def test_volumes_are_listed_with_what_they_are(folder: Path) -> None:
    entries = ShardSet(folder, "train").volumes
    assert [entry.volume for entry in entries] == [item.volume for item in IN_ORDER]
    assert [entry.first_sample for entry in entries] == [0, 5, 0, 0, 7]
    assert [entry.num_slices for entry in entries] == [5, 3, 2, 7, 4]
    assert [entry.has_ts for entry in entries] == [True, False, True, True, False]
    assert [entry.has_rex for entry in entries] == [False, False, False, True, True]
    assert [entry.labels for entry in entries] == [{"x": 1}, None, {"x": 0}, {"x": 1}, None]
    assert entries[1].spacing_mm == (0.7, 0.8, 4.5)
    assert entries[0].shape == (17, 19)
    assert (entries[0].source, entries[0].source_sha256) == ("dataset/train_1_a_1.nii.gz", f"{5:064d}")
    assert Path(entries[3].shard).name == "train-rex-000000.tar"


def test_every_slice_and_mask_comes_back(folder: Path) -> None:
    shards = ShardSet(folder, "train")
    for volume_id, item in enumerate(IN_ORDER):
        for z in range(len(item.ct)):
            np.testing.assert_array_equal(shards.read_ct(volume_id, z), item.ct[z])
        for z0, n in ((0, len(item.ct)), (1, 1), (len(item.ct) - 1, 1)):
            for read, planes in ((shards.read_ts, item.ts), (shards.read_rex, item.rex)):
                got = read(volume_id, z0, n)
                if planes is None:
                    assert got is None
                else:
                    assert got.dtype == planes.dtype
                    np.testing.assert_array_equal(got, planes[z0 : z0 + n])


def test_a_slab_is_one_read_and_holds_its_slices_and_masks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, pread, reads = ShardSet(folder, "train"), os.pread, []
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments) or pread(*arguments))
    for volume_id, item in enumerate(IN_ORDER):
        for z0, n in ((0, len(item.ct)), (1, 1), (len(item.ct) - 2, 2)):
            reads.clear()
            slab = shards.read_slab(volume_id, z0, n)
            for z in range(n):
                np.testing.assert_array_equal(slab.read_ct(z), item.ct[z0 + z])
            for got, planes in ((slab.read_ts(), item.ts), (slab.read_rex(), item.rex)):
                assert (got is None) == (planes is None)
                if planes is not None:
                    np.testing.assert_array_equal(got, planes[z0 : z0 + n])
            assert len(reads) == 1
    with pytest.raises(ValueError, match=r"slices must lie in 0\.\.4, got 3\.\.5 for volume 'train_1_a_1'"):
        shards.read_slab(0, 3, 3)


def test_only_the_split_asked_for_is_read(folder: Path) -> None:
    assert [entry.volume for entry in ShardSet(folder, "valid").volumes] == ["valid_1_a_1"]


def test_webdataset_reads_a_shard(folder: Path) -> None:
    """The samples the index addresses are those an ordinary WebDataset pipeline yields, in the same order."""
    samples = list(webdataset.WebDataset(str(folder / "train-rex-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples[:2]] == ["train_4_a_1_0000", "train_4_a_1_0001"]
    assert len(samples) == 11
    np.testing.assert_array_equal(decode_ct(samples[3]["ct.blosc2"]), ANNOTATED[0].ct[3])
    np.testing.assert_array_equal(decode_mask(samples[3]["ts.png"]), ANNOTATED[0].ts[3])
    np.testing.assert_array_equal(decode_mask(samples[8]["rex.png"]), ANNOTATED[1].rex[1])
    assert set(samples[8]) >= {"ct.blosc2", "rex.png", "json"}
    assert "ts.png" not in samples[8]


def test_the_same_volumes_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", iter(FIRST), plan="a plan")
    for name in ("train-000000.tar", "train-000000.index.npz"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_rejected_volumes_are_left_out_and_noted(tmp_path: Path) -> None:
    rejected = RejectedVolume("train_9_a_1", "unreadable", "it ends early")
    index = write_shard(tmp_path / "train-000000.tar", [rejected, *FIRST])
    assert index.rejected_volume.tolist() == ["train_9_a_1"]
    assert index.rejected_detail.tolist() == ["it ends early"]
    assert [entry.volume for entry in ShardSet(tmp_path, "train").volumes] == ["train_1_a_1", "train_2_a_1"]


def test_an_error_midway_leaves_no_shard(tmp_path: Path) -> None:
    def volumes() -> Iterator[VolumeSlices]:
        yield FIRST[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_shard(tmp_path / "train-000000.tar", volumes())
    assert list(tmp_path.iterdir()) == []


def test_an_index_never_outlives_its_shard(one_shard: Path) -> None:
    """Killed between the new tar and its index, a shard must not be read through the older index."""
    seen = []

    def volumes() -> Iterator[VolumeSlices]:
        seen.append(index_path(one_shard).exists())
        yield SECOND[0]

    assert index_path(one_shard).exists()
    write_shard(one_shard, volumes())
    assert seen == [False]


def test_a_volume_refused_by_the_schema_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="volume must come once in a shard, got 'train_1_a_1' twice"):
        write_shard(tmp_path / "train-000000.tar", [FIRST[0], FIRST[0]])
    with pytest.raises(ValueError, match="split must be 'valid' as in the shard's name, got 'train'"):
        write_shard(tmp_path / "valid-000000.tar", FIRST)
    with pytest.raises(ValueError, match="rex must be given in '-rex-' shards and only there, got True"):
        write_shard(tmp_path / "train-000000.tar", ANNOTATED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train.tar", "train-0.tar", "train-000000.tar.gz", "my-train-000000.tar"])
def test_other_names_than_a_shards_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"shard must be named <split>-000000.tar or .*, got '{name}'"):
        write_shard(tmp_path / name, [])


def test_a_set_survives_pickling(folder: Path) -> None:
    shards = ShardSet(folder, "train")
    shards.read_ct(0, 0)
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy.read_ct(3, 6), ANNOTATED[0].ct[6])


def checksums(shards: ShardSet) -> list[int]:
    return [int(shards.read_ct(i, z).sum()) for i, item in enumerate(IN_ORDER) for z in range(len(item.ct))]


def test_forked_processes_read_the_same(folder: Path) -> None:
    """Forked after a read, they share open files: reads must not move a common file position."""
    shards = ShardSet(folder, "train")
    expected = checksums(shards)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(checksums, [shards] * 4) == [expected] * 4


def test_threads_read_the_same_while_files_are_opened_and_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(folder, "train")
    expected = checksums(shards)
    monkeypatch.setattr(shards_module, "_opened", lru_cache(maxsize=1)(shards_module._opened.__wrapped__))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(checksums, [shards] * 8)) == [expected] * 8


def test_a_shard_replaced_under_its_name_is_read_anew(one_shard: Path) -> None:
    assert ShardSet(one_shard.parent, "train").read_ct(0, 0).sum() == FIRST[0].ct[0].sum()
    write_shard(one_shard, SECOND)
    np.testing.assert_array_equal(ShardSet(one_shard.parent, "train").read_ct(0, 1), SECOND[0].ct[1])


@pytest.mark.parametrize(("z0", "n"), [(-1, 1), (5, 1), (3, 3), (2, 0), (0, 6)])
def test_slices_that_are_not_there_are_refused(z0: int, n: int, folder: Path) -> None:
    shards = ShardSet(folder, "train")
    with pytest.raises(
        ValueError, match=rf"slices must lie in 0\.\.4, got {z0}\.\..* for volume 'train_1_a_1'"
    ):
        shards.read_ts(0, z0, n)
    if n == 1:
        with pytest.raises(ValueError, match=r"slices must lie in 0\.\.4"):
            shards.read_ct(0, z0)


def test_a_missing_folder_or_split_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="shards must be in a folder, got '.*nowhere', which is none"):
        ShardSet(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"must hold shards of split 'train', got splits \[\]"):
        ShardSet(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"of split 'test', got splits \['train', 'valid'\]"):
        ShardSet(folder, "test")


def test_a_shard_without_an_index_is_refused(one_shard: Path) -> None:
    index_path(one_shard).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.npz' must exist"):
        ShardSet(one_shard.parent, "train")


def test_a_truncated_shard_is_refused(one_shard: Path) -> None:
    os.truncate(one_shard, one_shard.stat().st_size - 512)
    with pytest.raises(ValueError, match="bytes as its index says"):
        ShardSet(one_shard.parent, "train")


def test_damage_inside_a_shard_names_the_slice(one_shard: Path) -> None:
    with tarfile.open(one_shard) as tar:
        member = tar.getmember("train_1_a_1_0002.ct.blosc2")
    with one_shard.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    shards = ShardSet(one_shard.parent, "train")
    np.testing.assert_array_equal(shards.read_ct(0, 1), FIRST[0].ct[1])
    with pytest.raises(
        ValueError, match=r"damaged at ct\.blosc2 of slice 2 of volume 'train_1_a_1'.*Delete the shard"
    ):
        shards.read_ct(0, 2)


@pytest.mark.parametrize("field", ["ct.blosc2", "ts.png"])
def test_a_single_wrong_bit_is_noticed(field: str, one_shard: Path) -> None:
    """Even where the slice could still be decoded: the index knows the CRC of every member."""
    with tarfile.open(one_shard) as tar:
        member = tar.getmember(f"train_1_a_1_0002.{field}")
    whole = one_shard.read_bytes()
    for place in (0, member.size // 2, member.size - 1):
        damaged = bytearray(whole)
        damaged[member.offset_data + place] ^= 16
        one_shard.write_bytes(damaged)
        slab = ShardSet(one_shard.parent, "train").read_slab(0, 1, 3)
        with pytest.raises(ValueError, match=rf"damaged at {field} of slice 2 of volume 'train_1_a_1': its"):
            slab.read_ct(1) if field == "ct.blosc2" else slab.read_ts()


def test_a_volume_in_two_shards_is_refused(one_shard: Path) -> None:
    write_shard(one_shard.with_name("train-000001.tar"), [FIRST[1]])
    with pytest.raises(
        ValueError, match=r"lie in one shard, got .*000000\.tar' and .*000001\.tar' for volume 'train_2"
    ):
        ShardSet(one_shard.parent, "train")


def test_unfinished_files_are_warned_of(one_shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    one_shard.with_name("train-000001.tar.partial").write_bytes(b"half")
    one_shard.with_name(".parts").mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet(one_shard.parent, "train").volumes) == 2
    assert "['.parts', 'train-000001.tar.partial']" in caplog.text
    assert "interrupted" in caplog.text


RNG = np.random.default_rng(0)
CT = RNG.integers(-1024, 3072, (7, 11, 13)).astype(np.int16)
TS = RNG.integers(1, 118, (7, 128, 128)).astype(np.uint8)
TS[3] = 0


def volume_of_stored_slab(name: str) -> VolumeSlices:
    return VolumeSlices(name, CT, TS, None, (0.7, 0.8, 1.5), (13, 11, 7), "LPS", None, "train")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ShardIndex]:
    shard = tmp_path_factory.mktemp("shards") / "train-000000.tar"
    index = write_shard(shard, [volume_of_stored_slab("a"), volume_of_stored_slab("b")])
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
