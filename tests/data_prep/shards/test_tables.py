import csv
from pathlib import Path

from common.ct.rejection import RejectedVolume
from common.shards.index import index_path
from common.shards.writer import VolumeSlices, write_shard
from data_prep.shards.tables import write_manifest, write_rejected
from tests.noise_volume import noise_volume


def volume(name: str, split: str, num_slices: int) -> VolumeSlices:
    fields = {"source_sha256": "00ff" * 16, "doubts": "head and feet are exchanged"}
    return noise_volume(name, num_slices, split=split, **fields)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_manifest_lists_the_volumes_of_every_finished_shard(tmp_path) -> None:
    write_shard(tmp_path / "valid-000000.tar", [volume("valid_1_a_1", "valid", 2)])
    write_shard(tmp_path / "train-000000.tar", [volume("c", "train", 3), volume("b", "train", 5)])
    write_shard(tmp_path / "train-000001.tar", [volume("d", "train", 2)])
    index_path(tmp_path / "train-000001.tar").unlink()
    write_manifest(tmp_path, "train", [], {})
    table = rows(tmp_path / "manifest.csv")
    assert [row["volume"] for row in table] == ["b", "c", "valid_1_a_1"]
    assert table[0] == {
        "volume": "b",
        "split": "train",
        "status": "written",
        "source": "in/b.nii.gz",
        "source_sha256": "00ff" * 16,
        "shard": "train-000000.tar",
        "first_sample": "3",
        "num_slices": "5",
        "spacing_x_mm": "0.7",
        "spacing_y_mm": "0.8",
        "spacing_z_mm": "1.5",
        "height_px": "11",
        "width_px": "13",
        "original_shape": "13x11x5",
        "original_axcodes": "LPS",
        "has_ts": "1",
        "has_rex": "0",
        "doubts": "head and feet are exchanged",
        "reason": "",
    }


def test_the_manifest_lists_what_was_left_out_too(tmp_path) -> None:
    write_shard(tmp_path / "train-000000.tar", [volume("b", "train", 3)])
    left_out = [
        RejectedVolume("c", "mask", "of another shape"),
        RejectedVolume("a", "duplicate", "two"),
    ]
    write_manifest(tmp_path, "train", left_out, {"b": "in/b.nii.gz", "c": "in/c, d.nii.gz"})
    table = rows(tmp_path / "manifest.csv")
    assert [(row["volume"], row["status"], row["source"], row["reason"]) for row in table] == [
        ("a", "rejected", "", "duplicate"),
        ("b", "written", "in/b.nii.gz", ""),
        ("c", "rejected", "in/c, d.nii.gz", "mask"),
    ]
    assert {value for name, value in table[2].items() if name not in ("volume", "split")} == {
        *("rejected", "in/c, d.nii.gz", "mask", ""),
    }


def test_rejected_rows_of_other_splits_stay_in_the_manifest(tmp_path) -> None:
    write_manifest(tmp_path, "valid", [RejectedVolume("v", "mask", "x")], {"v": "in/v.nii.gz"})
    write_manifest(tmp_path, "train", [RejectedVolume("t", "mask", "x")], {})
    write_manifest(tmp_path, "train", [RejectedVolume("u", "mask", "x")], {})
    table = rows(tmp_path / "manifest.csv")
    assert [(row["volume"], row["split"], row["source"]) for row in table] == [
        ("u", "train", ""),
        ("v", "valid", "in/v.nii.gz"),
    ]


def test_rejections_of_a_split_are_replaced_and_those_of_others_stay(tmp_path) -> None:
    write_rejected(tmp_path, "train", [RejectedVolume("a", "mask", 'it is "another", shape')])
    write_rejected(tmp_path, "valid", [RejectedVolume("v", "spacing", "nan")])
    write_rejected(tmp_path, "train", [RejectedVolume("c", "mask", "x"), RejectedVolume("b", "mask", "y, z")])
    assert [
        (row["volume"], row["split"], row["reason"], row["detail"]) for row in rows(tmp_path / "rejected.csv")
    ] == [
        ("b", "train", "mask", "y, z"),
        ("c", "train", "mask", "x"),
        ("v", "valid", "spacing", "nan"),
    ]
    write_rejected(tmp_path, "train", [])
    assert [row["volume"] for row in rows(tmp_path / "rejected.csv")] == ["v"]
