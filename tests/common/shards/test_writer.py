import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from common.ct.rejection import RejectedVolume
from common.shards.codec import decode_ct, decode_mask
from common.shards.index import FIELDS, ShardIndex, index_path, load_index
from common.shards.shards import ShardName, ShardSet
from common.shards.writer import VolumeSlices, write_shard, write_tar
from tests.noise_volume import noise_volume

LABELS = {"Emphysema": 1, "Atelectasis": 0}
Written = Callable[..., tuple[dict[str, bytes], ShardIndex, bytes]]


def volume(name: str = "train_1_a_1", num_slices: int = 3, annotated: bool = True) -> VolumeSlices:
    rex = np.zeros((num_slices, 128, 128), np.uint16)
    rex[1, 5, 7] = 2**13 | 2
    return noise_volume(name, num_slices)._replace(rex=rex if annotated else None, labels=LABELS)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Return ``written(volume) -> members by name, index, bytes of the tar``."""

    def write(item: VolumeSlices, annotated: bool = True) -> tuple[dict[str, bytes], ShardIndex, bytes]:
        path = tmp_path / ("train-rex-000000.tar" if annotated else "train-000000.tar")
        index = write_shard(path, [item])
        with tarfile.open(path) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar.getmembers()}
        return members, index, path.read_bytes()

    return write


def test_members_of_a_slice_lie_together_under_one_key(written: Written) -> None:
    members, _, _ = written(volume())
    assert list(members)[:5] == [
        "train_1_a_1_0000.ct.blosc2",
        "train_1_a_1_0000.ts.png",
        "train_1_a_1_0000.rex.png",
        "train_1_a_1_0000.json",
        "train_1_a_1_0001.ct.blosc2",
    ]
    assert len(members) == 3 * len(FIELDS)


def test_the_record_says_what_the_slice_is(written: Written) -> None:
    members, _, _ = written(volume())
    assert json.loads(members["train_1_a_1_0001.json"]) == {
        "schema_version": 2,
        "volume": "train_1_a_1",
        "slice_index": 1,
        "num_slices": 3,
        "spacing_mm": [0.7, 0.8, 1.5],
        "original_shape": [13, 11, 3],
        "original_axcodes": "LPS",
        "labels": LABELS,
        "rex_codes": ["1b", "2h"],
        "split": "train",
    }
    assert json.loads(members["train_1_a_1_0000.json"])["rex_codes"] == []


def test_what_a_volume_lacks_has_no_member(written: Written) -> None:
    members, index, _ = written(volume(annotated=False)._replace(ts=None, labels=None), annotated=False)
    assert {name.split(".", 1)[1] for name in members} == {"ct.blosc2", "json"}
    record = json.loads(members["train_1_a_1_0000.json"])
    assert record["rex_codes"] is None
    assert record["labels"] is None
    assert index.member_offset[:, 1:3].tolist() == [[-1, -1]] * 3
    assert (index.has_ts.tolist(), index.has_rex.tolist()) == ([False], [False])


def test_the_index_points_at_every_member(written: Written) -> None:
    members, index, tar = written(volume())
    for z in range(3):
        for column, field in enumerate(FIELDS):
            start, size = int(index.member_offset[z, column]), int(index.member_size[z, column])
            assert tar[start : start + size] == members[f"train_1_a_1_{z:04d}.{field}"]
            assert index.member_crc32[z, column] == zlib.crc32(tar[start : start + size])


def test_the_index_says_where_a_volume_came_from(written: Written) -> None:
    _, index, _ = written(volume()._replace(source="in/a b.nii.gz", source_sha256="0f" * 32))
    assert (index.source.tolist(), index.source_sha256.tolist()) == (["in/a b.nii.gz"], ["0f" * 32])


def test_flags_of_a_slice_say_whether_a_mask_is_empty(written: Written) -> None:
    item = volume()
    item.ts[2] = 0
    index = written(item)[1]
    assert index.slice_has_ts.tolist() == [True, True, False]
    assert index.slice_has_rex.tolist() == [False, True, False]


def test_the_tar_tells_no_owner_and_no_time(written: Written) -> None:
    _, _, first = written(volume())
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar.getmembers()} == {
            (0, 0, 0, "", "")
        }


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    """The samples the index addresses are those an ordinary WebDataset pipeline yields, in the same order."""
    first, second = volume(num_slices=7), volume("train_2_a_1", 4)._replace(ts=None)
    write_shard(tmp_path / "train-rex-000000.tar", [first, second])
    samples = list(webdataset.WebDataset(str(tmp_path / "train-rex-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples[:2]] == ["train_1_a_1_0000", "train_1_a_1_0001"]
    assert len(samples) == 11
    np.testing.assert_array_equal(decode_ct(samples[3]["ct.blosc2"]), first.ct[3])
    np.testing.assert_array_equal(decode_mask(samples[3]["ts.png"]), first.ts[3])
    np.testing.assert_array_equal(decode_mask(samples[8]["rex.png"]), second.rex[1])
    assert set(samples[8]) >= {"ct.blosc2", "rex.png", "json"}
    assert "ts.png" not in samples[8]


def test_the_same_volumes_give_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    volumes = [volume(), volume("train_2_a_1", 2)]
    write_shard(tmp_path / "train-rex-000000.tar", volumes, plan="a plan")
    write_tar(tmp_path / "part.tar", ShardName("train", annotated=True), iter(volumes), plan="a plan")
    for suffix in (".tar", ".index.npz"):
        paths = (tmp_path / f"{name}{suffix}" for name in ("train-rex-000000", "part"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_the_index_has_one_row_per_volume_and_is_what_is_read(tmp_path: Path) -> None:
    rejected = RejectedVolume("train_9_a_1", "unreadable", "it ends early")
    second = volume("train_2_a_1", 2)._replace(labels=None, original_axcodes="RAS")
    index = write_shard(tmp_path / "train-rex-000000.tar", [rejected, volume(), second], plan="a plan")
    assert index.rejections == [rejected]
    assert index.labels.tolist() == [[1, 0], [-1, -1]]
    assert index.original_axcodes.tolist() == ["LPS", "RAS"]
    assert (index.num_slices.tolist(), index.first_sample.tolist()) == ([3, 2], [0, 3])
    assert index.spacing_mm.tolist() == [[0.7, 0.8, 1.5]] * 2
    read = load_index(tmp_path / "train-rex-000000.tar")
    for name in ShardIndex._fields:
        np.testing.assert_array_equal(getattr(index, name), getattr(read, name), err_msg=name)
    assert [entry.volume for entry in ShardSet(tmp_path, "train").volumes] == ["train_1_a_1", "train_2_a_1"]


def test_a_shard_all_of_whose_volumes_were_rejected_has_an_index(tmp_path: Path) -> None:
    index = write_shard(tmp_path / "train-000000.tar", [RejectedVolume("a", "unreadable", "")])
    assert index.member_offset.shape == (0, 4)
    assert index.spacing_mm.shape == (0, 3)
    assert index.labels.shape == (0, 0)
    assert index.first_sample.tolist() == []


def test_an_error_midway_leaves_no_shard(tmp_path: Path) -> None:
    def volumes() -> Iterator[VolumeSlices]:
        yield volume()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_shard(tmp_path / "train-rex-000000.tar", volumes())
    assert list(tmp_path.iterdir()) == []


def test_an_index_never_outlives_its_shard(tmp_path: Path) -> None:
    """Killed between the new tar and its index, a shard must not be read through the older index."""
    shard, found = tmp_path / "train-rex-000000.tar", []

    def volumes() -> Iterator[VolumeSlices]:
        found.append(index_path(shard).exists())
        yield volume()

    write_shard(shard, [volume()])
    assert index_path(shard).exists()
    write_shard(shard, volumes())
    assert found == [False]


@pytest.mark.parametrize("name", ["train.tar", "train-0.tar", "train-000000.tar.gz", "my-train-000000.tar"])
def test_other_names_than_a_shards_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"<split>-000000.tar or .*, got '{name}'"):
        write_shard(tmp_path / name, [])


ZEROS = np.zeros((3, 128, 128), np.uint16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume": "../escape"}, r"volume.*'\.\./escape'"),
        ({"volume": "a.b"}, r"volume.*'a\.b'"),
        ({"volume": ""}, "volume.*''"),
        ({"volume": "x" * 81}, "volume must match"),
        ({"split": "valid"}, "split must be 'train'.*'valid' for volume 'train_1_a_1'"),
        ({"spacing_mm": (0.7, 0.8, np.nan)}, r"spacing_mm.*\(0\.7, 0\.8, nan\)"),
        ({"spacing_mm": (0.7, 0.0, 1.0)}, "spacing_mm must be positive"),
        ({"labels": {"x": 2}}, r"labels.*\{'x': 2\}"),
        ({"ct": np.zeros((3, 11, 13), np.float32)}, r"ct must be int16.*float32 \(3, 11, 13\)"),
        ({"ct": np.zeros((0, 11, 13), np.int16)}, r"ct must be int16.*int16 \(0, 11, 13\)"),
        ({"ct": np.zeros((10_001, 1, 1), np.int16)}, "ct must have at most 10000 slices, got 10001"),
        ({"rex": None}, "rex must be given in '-rex-' shards and only there, got False"),
        ({"ts": ZEROS}, r"ts must be uint8.*uint16 \(3, 128, 128\)"),
        ({"ts": np.full((3, 128, 128), 118, np.uint8)}, "ids below 118, got uint8 .* up to 118"),
        ({"ts": np.zeros((2, 128, 128), np.uint8)}, r"got uint8 \(2, 128, 128\)"),
        ({"rex": ZEROS[:, :64]}, r"rex must be uint16.*uint16 \(3, 64, 128\)"),
        ({"rex": ZEROS + 2**14}, "14 bits, got uint16 .* up to 16384"),
    ],
)
def test_volumes_that_do_not_follow_the_schema_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "train-rex-000000.tar", [volume()._replace(**changes)])
    assert list(tmp_path.iterdir()) == []


def test_volumes_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'train_1_a_1' comes twice"):
        write_shard(tmp_path / "train-rex-000000.tar", [volume(), volume()])
    with pytest.raises(ValueError, match="'-rex-' shards and only there, got True"):
        write_shard(tmp_path / "train-000000.tar", [volume()])
    other = volume("train_2_a_1")._replace(labels=dict(reversed(LABELS.items())))
    with pytest.raises(ValueError, match=r"labels must.*same classes.*\['Atelectasis', 'Emphysema'\]"):
        write_shard(tmp_path / "train-rex-000000.tar", [volume(), other])
