from pathlib import Path

import numpy as np
import pytest

from common.ct.rejection import RejectedVolume
from common.shards.codec import VolumeSlices
from common.shards.index import (
    ABSENT_MEMBER,
    SCHEMA_VERSION,
    IndexBuilder,
    ShardIndex,
    index_path,
    load_index,
    save_index,
    volume_entries,
)
from common.shards.shards import write_shard

COLUMNS = {
    "num_slices": 2,
    "spacing_mm": (0.7, 0.8, 1.5),
    "shape": (11, 13),
    "original_shape": (13, 11, 2),
    "original_axcodes": "LPS",
    "source": "in/a.nii.gz",
    "source_sha256": "0" * 64,
    "doubts": "",
    "has_ts": True,
    "has_rex": False,
}


def build(tar_bytes: int = 3) -> ShardIndex:
    builder = IndexBuilder("train")
    builder.add_volume("a", {"x": 1, "y": 0}, **COLUMNS)
    builder.add_slice(
        [(512, 7, 2**32 - 1), (1536, 5, 6), ABSENT_MEMBER, (2560, 3, 1)], has_ts=True, has_rex=False
    )
    builder.add_slice(
        [(3584, 8, 11), (4608, 6, 12), ABSENT_MEMBER, (5632, 4, 13)], has_ts=False, has_rex=False
    )
    builder.add_volume("bb", None, **(COLUMNS | {"num_slices": 1, "original_axcodes": "RAS"}))
    builder.add_slice(
        [(6656, 9, 21), ABSENT_MEMBER, ABSENT_MEMBER, (7680, 2, 22)], has_ts=False, has_rex=False
    )
    builder.rejected.append(RejectedVolume("c", "unreadable", "c.nii.gz ends early"))
    return builder.build("plan 1", tar_bytes)


def stored(folder: Path, **changes: object) -> Path:
    shard = folder / "train-000000.tar"
    shard.write_bytes(b"tar")
    save_index(shard, build()._replace(**changes))
    return shard


def test_every_array_comes_back(tmp_path: Path) -> None:
    index, expected = load_index(stored(tmp_path)), build()
    for name in ShardIndex._fields:
        np.testing.assert_array_equal(getattr(index, name), getattr(expected, name), err_msg=name)


def test_arrays_have_one_row_a_slice_or_a_volume() -> None:
    index = build()
    assert index.member_offset.tolist()[0] == [512, 1536, -1, 2560]
    assert index.member_size.tolist()[1] == [8, 6, -1, 4]
    assert index.member_crc32.tolist() == [[2**32 - 1, 6, 0, 1], [11, 12, 0, 13], [21, 0, 0, 22]]
    assert index.slice_has_ts.tolist() == [True, False, False]
    assert index.first_sample.tolist() == [0, 2]
    assert index.labels.tolist() == [[1, 0], [-1, -1]]
    assert index.original_axcodes.tolist() == ["LPS", "RAS"]
    assert index.rejected_reason.tolist() == ["unreadable"]


def test_a_shard_all_of_whose_volumes_were_rejected_has_an_index() -> None:
    index = IndexBuilder("train").build("", tar_bytes=0)
    assert index.member_offset.shape == (0, 4)
    assert index.spacing_mm.shape == (0, 3)
    assert index.labels.shape == (0, 0)
    assert index.first_sample.tolist() == []


def test_the_same_index_has_the_same_bytes(tmp_path: Path) -> None:
    first = index_path(stored(tmp_path)).read_bytes()
    assert index_path(stored(tmp_path)).read_bytes() == first


def test_one_volume_twice_and_other_labels_are_refused() -> None:
    builder = IndexBuilder("train")
    builder.add_volume("a", {"x": 1, "y": 0}, **COLUMNS)
    with pytest.raises(ValueError, match="volume must come once in a shard, got 'a' twice"):
        builder.add_volume("a", None, **COLUMNS)
    with pytest.raises(
        ValueError, match=r"labels must name the same classes in a shard, got \['y', 'x'\] for volume"
    ):
        builder.add_volume("b", {"y": 1, "x": 0}, **COLUMNS)


def test_a_missing_shard_or_index_is_named(tmp_path: Path) -> None:
    shard = stored(tmp_path)
    index_path(shard).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-000000\.index\.npz' must exist\. Run the same python -m data_prep"
    ):
        load_index(shard)
    with pytest.raises(FileNotFoundError, match=r"train-000007\.tar' must exist"):
        load_index(tmp_path / "train-000007.tar")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    shard = stored(tmp_path, schema_version=np.int64(SCHEMA_VERSION + 1))
    with pytest.raises(
        ValueError, match=r"schema_version must be 2, got 3 for '.*npz'\. Write the shards again"
    ):
        load_index(shard)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("volume", 1, r"volume must have 2 rows, one a volume, got \(1,\)"),
        ("labels", 1, r"labels must have 2 rows, one a volume, got \(1,\)"),
        ("num_slices", 1, r"member_offset must have 2 rows, one a slice, got \(3,\)"),
        ("member_crc32", 2, r"member_crc32 must have 3 rows, one a slice, got \(2,\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    tmp_path: Path, name: str, rows: int, message: str
) -> None:
    shard = stored(tmp_path, **{name: getattr(build(), name)[:rows]})
    with pytest.raises(ValueError, match=rf"{message} in '.*npz'\. Delete the shard"):
        load_index(shard)


def test_a_shard_of_another_size_is_refused(tmp_path: Path) -> None:
    shard = stored(tmp_path)
    shard.write_bytes(b"ta")
    with pytest.raises(ValueError, match=r"tar' must have 3 bytes as its index says, got 2\. Copy it again"):
        load_index(shard)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    shard = stored(tmp_path)
    whole = index_path(shard).read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2], whole[:300] + bytes(50) + whole[350:]):
        index_path(shard).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"npz' must be a readable index, got .*Delete the shard"):
            load_index(shard)
    place = whole.index(b"PK\x01\x02") + 6  # the version of zip that it takes to unpack
    index_path(shard).write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"npz' must be a readable index, got zip file version"):
        load_index(shard)


def test_objects_that_need_pickle_are_not_loaded(tmp_path: Path) -> None:
    shard = stored(tmp_path, plan=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="must be a readable index, got Object arrays cannot be loaded"):
        load_index(shard)


def volume(name: str, num_slices: int, labels: dict[str, int] | None) -> VolumeSlices:
    return VolumeSlices(
        volume=name,
        ct=np.zeros((num_slices, 11, 13), np.int16),
        ts=None,
        rex=None,
        spacing_mm=(0.7, 0.8, 1.5),
        original_shape=(13, 11, num_slices),
        original_axcodes="LPS",
        labels=labels,
        split="train",
        source=f"in/{name}.nii.gz",
        source_sha256="5f" * 32,
    )


def test_entries_are_of_plain_python_types(tmp_path: Path) -> None:
    """They go into logs, tables and JSON: no NumPy scalars."""
    index = write_shard(
        tmp_path / "train-000000.tar", [volume("a", 3, None), volume("b", 5, {"x": 0, "y": 1})]
    )
    first, second = volume_entries("some.tar", index)
    assert first.labels is None
    assert second._asdict() == {
        "volume": "b",
        "shard": "some.tar",
        "first_sample": 3,
        "num_slices": 5,
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
