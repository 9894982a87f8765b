import logging
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from common.shards import shards as shards_module
from common.shards.shards import ShardSet
from common.shards.writer import VolumeSlices, write_shard
from tests.noise_volume import noise_volume


def volume(name: str, num_slices: int, annotated: bool = False, with_ts: bool = True) -> VolumeSlices:
    made = noise_volume(name, num_slices, (17, 19), ts=with_ts, rex=annotated)
    if with_ts:
        made.ts[0] = 0
    if annotated:
        made.rex[-1] = 0
    labels = {"x": num_slices % 2} if with_ts else None
    fields = {"source": f"dataset/{name}.nii.gz", "source_sha256": f"{num_slices:064d}"}
    return made._replace(spacing_mm=(0.7, 0.8, 1.5 + num_slices), labels=labels, **fields)


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
                    assert got.dtype == planes.dtype
                    np.testing.assert_array_equal(got, planes[z0 : z0 + n])
            assert len(reads) == 1


def test_only_the_split_asked_for_is_read(folder: Path) -> None:
    assert [entry.volume for entry in ShardSet(folder, "valid").volumes] == ["valid_1_a_1"]


def test_a_set_survives_pickling(folder: Path) -> None:
    shards = ShardSet(folder, "train")
    shards.read_slab(0, 0, 1).read_ct(0)
    copy = pickle.loads(pickle.dumps(shards))
    np.testing.assert_array_equal(copy.read_slab(3, 6, 1).read_ct(0), ANNOTATED[0].ct[6])


def checksums(shards: ShardSet) -> list[int]:
    return [
        int(shards.read_slab(i, z, 1).read_ct(0).sum())
        for i, item in enumerate(IN_ORDER)
        for z in range(len(item.ct))
    ]


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
    assert ShardSet(one_shard.parent, "train").read_slab(0, 0, 1).read_ct(0).sum() == FIRST[0].ct[0].sum()
    write_shard(one_shard, SECOND)
    np.testing.assert_array_equal(
        ShardSet(one_shard.parent, "train").read_slab(0, 1, 1).read_ct(0), SECOND[0].ct[1]
    )


@pytest.mark.parametrize(("z0", "n"), [(-1, 1), (5, 1), (3, 3), (2, 0), (0, 6)])
def test_slices_that_are_not_there_are_refused(z0: int, n: int, folder: Path) -> None:
    shards = ShardSet(folder, "train")
    with pytest.raises(
        ValueError, match=rf"slices must lie in 0\.\.4, got {z0}\.\..* for volume 'train_1_a_1'"
    ):
        shards.read_slab(0, z0, n)


def test_a_missing_folder_or_split_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No folder of shards '.*nowhere'"):
        ShardSet(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"split 'train' in .*splits \[\]"):
        ShardSet(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"split 'test' in .*splits \['train', 'valid'\]"):
        ShardSet(folder, "test")


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
        damage = rf"000000\.tar' is damaged at {field} of slice 2 of volume 'train_1_a_1': its .*Delete"
        with pytest.raises(ValueError, match=damage):
            slab.read_ct(1) if field == "ct.blosc2" else slab.read_ts()


def test_a_volume_in_two_shards_is_refused(one_shard: Path) -> None:
    write_shard(one_shard.with_name("train-000001.tar"), [FIRST[1]])
    with pytest.raises(ValueError, match=r"'train_2_a_1' lies in two.*000000\.tar' and .*000001\.tar'"):
        ShardSet(one_shard.parent, "train")


def test_unfinished_files_are_warned_of(one_shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    one_shard.with_name("train-000001.tar.partial").write_bytes(b"half")
    one_shard.with_name(".parts").mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(ShardSet(one_shard.parent, "train").volumes) == 2
    assert "['.parts', 'train-000001.tar.partial']" in caplog.text
    assert "interrupted" in caplog.text


def test_a_slab_holds_nothing_of_its_neighbours(folder: Path) -> None:
    slab = ShardSet(folder, "train").read_slab(0, 1, 3)
    keys = [f"train_1_a_1_{z:04d}.".encode() for z in range(5)]
    assert [key in slab.data for key in keys] == [False, True, True, True, False]
    tar = Path(slab.entry.shard).read_bytes()
    assert slab.start == tar.index(b"train_1_a_1_0001.ct.blosc2") + 512
    assert tar[slab.start :].startswith(slab.data)
