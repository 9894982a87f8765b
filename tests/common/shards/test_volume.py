import io
import json
import tarfile
import zlib
from typing import Any

import numpy as np
import pytest

from common.shards.codec import decode_ct, decode_mask
from common.shards.index import FIELDS, IndexBuilder
from common.shards.volume import NUM_TS_CLASSES, REX_CODES, VolumeSlices, add_volume

LABELS = {"Emphysema": 1, "Atelectasis": 0}


def volume(name: str = "train_1_a_1", num_slices: int = 3, annotated: bool = True) -> VolumeSlices:
    rng = np.random.default_rng(len(name))
    rex = np.zeros((num_slices, 128, 128), np.uint16)
    rex[1, 5, 7] = 2**13 | 2
    return VolumeSlices(
        volume=name,
        ct=rng.integers(-1024, 3071, (num_slices, 11, 13)).astype(np.int16),
        ts=rng.integers(0, NUM_TS_CLASSES, (num_slices, 128, 128)).astype(np.uint8),
        rex=rex if annotated else None,
        spacing_mm=(0.7, 0.8, 1.5),
        original_shape=(13, 11, num_slices),
        original_axcodes="LPS",
        labels=LABELS,
        split="train",
    )


def written(item: VolumeSlices, annotated: bool = True) -> tuple[dict[str, bytes], IndexBuilder, bytes]:
    buffer, builder = io.BytesIO(), IndexBuilder("train")
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        add_volume(tar, builder, item, annotated)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar.getmembers()}
    return members, builder, buffer.getvalue()


def test_codes_and_classes_are_those_of_the_label_lists() -> None:
    assert (len(REX_CODES), REX_CODES[0], REX_CODES[13], NUM_TS_CLASSES) == (14, "1a", "2h", 118)


def test_members_of_a_slice_lie_together_under_one_key() -> None:
    members, _, _ = written(volume())
    assert list(members)[:5] == [
        "train_1_a_1_0000.ct.blosc2",
        "train_1_a_1_0000.ts.png",
        "train_1_a_1_0000.rex.png",
        "train_1_a_1_0000.json",
        "train_1_a_1_0001.ct.blosc2",
    ]
    assert len(members) == 3 * len(FIELDS)


def test_members_hold_the_slices() -> None:
    item = volume()
    members, _, _ = written(item)
    for z in range(3):
        np.testing.assert_array_equal(decode_ct(members[f"train_1_a_1_{z:04d}.ct.blosc2"]), item.ct[z])
        np.testing.assert_array_equal(decode_mask(members[f"train_1_a_1_{z:04d}.ts.png"]), item.ts[z])
        np.testing.assert_array_equal(decode_mask(members[f"train_1_a_1_{z:04d}.rex.png"]), item.rex[z])


def test_the_record_says_what_the_slice_is() -> None:
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


def test_what_a_volume_lacks_has_no_member() -> None:
    members, builder, _ = written(volume(annotated=False)._replace(ts=None, labels=None), annotated=False)
    assert {name.split(".", 1)[1] for name in members} == {"ct.blosc2", "json"}
    record = json.loads(members["train_1_a_1_0000.json"])
    assert record["rex_codes"] is None
    assert record["labels"] is None
    index = builder.build("", 0)
    assert index.member_offset[:, 1:3].tolist() == [[-1, -1]] * 3
    assert (index.has_ts.tolist(), index.has_rex.tolist()) == ([False], [False])


def test_the_index_points_at_every_member() -> None:
    members, builder, tar = written(volume())
    index = builder.build("", len(tar))
    for z in range(3):
        for column, field in enumerate(FIELDS):
            start, size = int(index.member_offset[z, column]), int(index.member_size[z, column])
            assert tar[start : start + size] == members[f"train_1_a_1_{z:04d}.{field}"]
            assert index.member_crc32[z, column] == zlib.crc32(tar[start : start + size])


def test_the_index_says_where_a_volume_came_from() -> None:
    _, builder, tar = written(volume()._replace(source="in/a b.nii.gz", source_sha256="0f" * 32))
    index = builder.build("", len(tar))
    assert (index.source.tolist(), index.source_sha256.tolist()) == (["in/a b.nii.gz"], ["0f" * 32])


def test_flags_of_a_slice_say_whether_a_mask_is_empty() -> None:
    item = volume()
    item.ts[2] = 0
    index = written(item)[1].build("", 0)
    assert index.slice_has_ts.tolist() == [True, True, False]
    assert index.slice_has_rex.tolist() == [False, True, False]


def test_the_tar_tells_no_owner_and_no_time() -> None:
    _, _, first = written(volume())
    _, _, second = written(volume())
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar.getmembers()} == {
            (0, 0, 0, "", "")
        }


ZEROS = np.zeros((3, 128, 128), np.uint16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume": "../escape"}, r"volume must match .*, got '\.\./escape'\. Rename its file"),
        ({"volume": "a.b"}, r"volume must match .*, got 'a\.b'"),
        ({"volume": ""}, "volume must match .*, got ''"),
        ({"volume": "x" * 81}, "volume must match"),
        (
            {"split": "valid"},
            "split must be 'train' as in the shard's name, got 'valid' for volume 'train_1_a_1'",
        ),
        (
            {"spacing_mm": (0.7, 0.8, np.nan)},
            r"spacing_mm must be positive, got \(0\.7, 0\.8, nan\) for volume",
        ),
        ({"spacing_mm": (0.7, 0.0, 1.0)}, "spacing_mm must be positive"),
        ({"labels": {"x": 2}}, r"labels must be 0 or 1, got \{'x': 2\} for volume 'train_1_a_1'"),
        (
            {"ct": np.zeros((3, 11, 13), np.float32)},
            r"ct must be int16 of shape \(Z, H, W\), got float32 \(3, 11, 13\)",
        ),
        (
            {"ct": np.zeros((0, 11, 13), np.int16)},
            r"ct must be int16 of shape \(Z, H, W\), got int16 \(0, 11, 13\)",
        ),
        (
            {"ct": np.zeros((10_001, 1, 1), np.int16)},
            "ct must have at most 10000 slices, got 10001 for volume",
        ),
        ({"rex": None}, "rex must be given in '-rex-' shards and only there, got False for volume"),
        (
            {"ts": ZEROS},
            r"ts must be uint8 of shape \(3, 128, 128\) with ids below 118, got uint16 \(3, 128, 128\)",
        ),
        ({"ts": np.full((3, 128, 128), 118, np.uint8)}, "ids below 118, got uint8 .* up to 118 for volume"),
        ({"ts": np.zeros((2, 128, 128), np.uint8)}, r"got uint8 \(2, 128, 128\)"),
        (
            {"rex": ZEROS[:, :64]},
            r"rex must be uint16 of shape \(3, 128, 128\) with 14 bits, got uint16 \(3, 64, 128\)",
        ),
        ({"rex": ZEROS + 2**14}, "with 14 bits, got uint16 .* up to 16384 for volume"),
    ],
)
def test_volumes_that_do_not_follow_the_schema_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(volume()._replace(**changes))
