from pathlib import Path

import numpy as np

from common.shards.shards import write_shard
from common.shards.volume import VolumeSlices
from common.shards.volume_entry import volume_entries


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
