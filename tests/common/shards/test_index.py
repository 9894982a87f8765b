from pathlib import Path

import numpy as np
import pytest

from common.shards.index import SCHEMA_VERSION, ShardIndex, index_path, load_index, save_index, volume_entries
from common.shards.writer import write_shard
from tests.noise_volume import noise_volume


def write(folder: Path) -> tuple[Path, ShardIndex]:
    shard = folder / "train-000000.tar"
    labelled = noise_volume("b", 2, ts=False, labels={"x": 0, "y": 1}, source_sha256="5f" * 32)
    return shard, write_shard(shard, [noise_volume("a", 1, ts=False), labelled])


def change(folder: Path, **changes: object) -> Path:
    shard, index = write(folder)
    save_index(shard, index._replace(**changes))
    return shard


def test_entries_are_of_plain_python_types(tmp_path: Path) -> None:
    """They go into logs, tables and JSON: no NumPy scalars."""
    first, second = volume_entries("some.tar", write(tmp_path)[1])
    assert first.labels is None
    assert second._asdict() == {
        "volume": "b",
        "shard": "some.tar",
        "first_sample": 1,
        "num_slices": 2,
        "spacing_mm": (0.7, 0.8, 1.5),
        "shape": (11, 13),
        "has_ts": False,
        "has_rex": False,
        "labels": {"x": 0, "y": 1},
        "source": "in/b.nii.gz",
        "source_sha256": "5f" * 32,
    }
    assert {type(value) for value in second} == {str, int, tuple, bool, dict}
    assert {type(value) for value in (*second.spacing_mm, *second.shape)} == {float, int}


def test_a_missing_shard_or_index_is_named(tmp_path: Path) -> None:
    shard, _ = write(tmp_path)
    index_path(shard).unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000\.index\.npz'.*python -m data_prep"):
        load_index(shard)
    with pytest.raises(FileNotFoundError, match=r"train-000007\.tar'"):
        load_index(tmp_path / "train-000007.tar")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    shard = change(tmp_path, schema_version=np.int64(SCHEMA_VERSION + 1))
    with pytest.raises(ValueError, match=r"schema_version must be 2, got 3 for '.*npz'"):
        load_index(shard)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("volume", 1, r"volume must have 2 rows, one per volume, got \(1,\)"),
        ("labels", 1, r"labels must have 2 rows, one per volume, got \(1,\)"),
        ("num_slices", 1, r"member_offset must have 1 rows, one per slice, got \(3,\)"),
        ("member_crc32", 2, r"member_crc32 must have 3 rows, one per slice, got \(2,\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    tmp_path: Path, name: str, rows: int, message: str
) -> None:
    _, index = write(tmp_path)
    shard = change(tmp_path, **{name: getattr(index, name)[:rows]})
    with pytest.raises(ValueError, match=rf"{message} in '.*npz'"):
        load_index(shard)


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    shard, index = write(tmp_path)
    shard.write_bytes(b"ta")
    with pytest.raises(ValueError, match=rf"tar' has 2 bytes, .* {index.tar_bytes}\. Copy it again"):
        load_index(shard)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    shard, _ = write(tmp_path)
    whole = index_path(shard).read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2], whole[:300] + bytes(50) + whole[350:]):
        index_path(shard).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"npz': .*Delete the shard"):
            load_index(shard)
    place = whole.index(b"PK\x01\x02") + 6  # the version of zip that it takes to unpack
    index_path(shard).write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"npz': zip file version"):
        load_index(shard)


def test_objects_that_need_pickle_are_not_loaded(tmp_path: Path) -> None:
    shard = change(tmp_path, plan=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        load_index(shard)
