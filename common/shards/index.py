"""The index beside a shard: where every member lies, and what every volume is.

Shapes: N volumes and S slices of one shard, F members of one sample, C labels, R rejected volumes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.ct.rejection import RejectedVolume
from common.ct.unzip import DAMAGED_ZIP
from common.run.process import atomic_file

SCHEMA_VERSION = 2
FIELDS = ("ct.blosc2", "ts.png", "rex.png", "json")
ABSENT = -1
UNLABELLED = -1


class ShardIndex(NamedTuple):
    """Arrays of ``<shard>.index.npz``; none of them needs pickle.

    Args:
        schema_version: ``SCHEMA_VERSION`` is what this code reads and writes.
        split: split of every volume in the shard.
        plan: fingerprint of what the shard was to hold; empty where the writer gave none.
        tar_bytes: size of the tar, so that a truncated or exchanged one is noticed.
        member_offset: ``(S, F)`` int64, first byte of a member's data in the tar; -1 where absent.
        member_size: ``(S, F)`` int32, its bytes; -1 where absent.
        member_crc32: ``(S, F)`` uint32, ``zlib.crc32`` of its bytes; 0 where absent.
        volume: ``(N,)`` names, in the order of their slices.
        num_slices: ``(N,)``.
        spacing_mm: ``(N, 3)`` as (x, y, z).
        shape: ``(N, 2)`` slice height and width.
        original_shape: ``(N, 3)`` as stored in the source.
        original_axcodes: ``(N,)`` such as ``LPS``, as stored in the source.
        source: ``(N,)`` path of the CT, of a DICOM series its folder, relative to the input folder.
        source_sha256: ``(N,)`` of the CT's bytes; of several files, of their digests in order.
        doubts: ``(N,)`` what makes the volume unlike a chest CT, as text; empty where nothing does.
        has_ts: ``(N,)`` whether the volume has a TotalSegmentator label map.
        has_rex: ``(N,)`` whether the volume is annotated by ReXGroundingCT.
        slice_has_ts: ``(S,)`` whether any organ is in the slice.
        slice_has_rex: ``(S,)`` whether any finding is in the slice.
        label_names: ``(C,)``; empty where no volume has labels.
        labels: ``(N, C)`` int8, 0 or 1; -1 in the row of a volume without labels.
        rejected_volume: ``(R,)`` volumes of the plan that could not be read.
        rejected_reason: ``(R,)`` why.
        rejected_detail: ``(R,)`` one line for a person.
    """

    schema_version: np.integer | np.ndarray
    split: np.ndarray
    plan: np.ndarray
    tar_bytes: np.integer | np.ndarray
    member_offset: np.ndarray
    member_size: np.ndarray
    member_crc32: np.ndarray
    volume: np.ndarray
    num_slices: np.ndarray
    spacing_mm: np.ndarray
    shape: np.ndarray
    original_shape: np.ndarray
    original_axcodes: np.ndarray
    source: np.ndarray
    source_sha256: np.ndarray
    doubts: np.ndarray
    has_ts: np.ndarray
    has_rex: np.ndarray
    slice_has_ts: np.ndarray
    slice_has_rex: np.ndarray
    label_names: np.ndarray
    labels: np.ndarray
    rejected_volume: np.ndarray
    rejected_reason: np.ndarray
    rejected_detail: np.ndarray

    @property
    def rejections(self) -> list[RejectedVolume]:
        """Volumes of the plan that the shard does without."""
        rows = zip(self.rejected_volume, self.rejected_reason, self.rejected_detail, strict=True)
        return [RejectedVolume(str(volume), str(reason), str(detail)) for volume, reason, detail in rows]

    @property
    def first_sample(self) -> np.ndarray:
        """``(N,)`` row of each volume's first slice in the per-slice arrays."""
        return np.cumsum(self.num_slices) - self.num_slices


def index_path(shard: Path) -> Path:
    """Return the path of the index that belongs to ``<name>.tar``."""
    return shard.with_suffix(".index.npz")


def save_index(shard: Path, index: ShardIndex) -> None:
    """Write the index of a finished shard, so that it is there in full or not at all."""
    with atomic_file(index_path(shard)) as file:
        np.savez_compressed(file, **index._asdict())


def load_index(shard: Path) -> ShardIndex:
    """Read the index of a shard (path of the tar) and check that it belongs to it.

    Raises:
        FileNotFoundError: if the shard or its index is missing: an interrupted run leaves such shards.
        ValueError: if the index is damaged, of another schema version, holds arrays that do not belong
            together, or states another size of the tar.
    """
    path = index_path(shard)
    for file in (shard, path):
        if not file.is_file():
            raise FileNotFoundError(
                f"No '{file}'. Run the same python -m data_prep command again: it resumes."
            )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            version = int(arrays["schema_version"])
            if version == SCHEMA_VERSION:
                known = {name: arrays[name] for name in ShardIndex._fields if name in arrays}
                index = ShardIndex(**{"doubts": np.full(len(known["volume"]), ""), **known})
    except (OSError, KeyError, ValueError, TypeError, SyntaxError, MemoryError, *DAMAGED_ZIP) as error:
        raise ValueError(
            f"Cannot read index '{path}': {error}. Delete the shard and run data_prep again."
        ) from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version must be {SCHEMA_VERSION}, got {version} for '{path}'. "
            "Write the shards again with data_prep."
        )
    _check_rows(index, path)
    size = shard.stat().st_size
    if size != index.tar_bytes:
        raise ValueError(
            f"'{shard}' has {size} bytes, and its index says {index.tar_bytes}. "
            "Copy it again, or delete it and run data_prep again."
        )
    return index


def _check_rows(index: ShardIndex, path: Path) -> None:
    """Refuse arrays that do not belong together: slices would be read at another volume's place."""
    per_slice = {"member_offset", "member_size", "member_crc32", "slice_has_ts", "slice_has_rex"}
    once = {"schema_version", "split", "plan", "tar_bytes", "label_names"}
    expected = {"volume": len(index.num_slices), "slice": int(index.num_slices.sum())}
    for name in ShardIndex._fields:
        kind = "slice" if name in per_slice else "volume"
        rows = np.shape(getattr(index, name))[:1]
        if name not in once and not name.startswith("rejected") and rows != (expected[kind],):
            raise ValueError(
                f"{name} must have {expected[kind]} rows, one per {kind}, got {rows} in '{path}'. "
                "Delete the shard and run data_prep again."
            )


class VolumeEntry(NamedTuple):
    """One volume of a shard set: rows of ``ShardIndex`` as Python's own types.

    ``shard`` is the path of the tar, ``first_sample`` the place of its first slice there, ``labels`` a class
    name to 0 or 1, or None.
    """

    volume: str
    shard: str
    first_sample: int
    num_slices: int
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int]
    has_ts: bool
    has_rex: bool
    labels: dict[str, int] | None
    source: str
    source_sha256: str


def volume_entries(shard: str, index: ShardIndex) -> list[VolumeEntry]:
    """List the volumes of a shard, of which the path is given, too."""
    names, first_samples = index.label_names.tolist(), index.first_sample.tolist()
    return [
        VolumeEntry(
            volume=str(index.volume[i]),
            shard=shard,
            first_sample=first_samples[i],
            num_slices=int(index.num_slices[i]),
            spacing_mm=tuple(index.spacing_mm[i].tolist()),
            shape=tuple(index.shape[i].tolist()),
            has_ts=bool(index.has_ts[i]),
            has_rex=bool(index.has_rex[i]),
            labels=None
            if not names or UNLABELLED in index.labels[i]
            else dict(zip(names, index.labels[i].tolist(), strict=True)),
            source=str(index.source[i]),
            source_sha256=str(index.source_sha256[i]),
        )
        for i in range(len(index.volume))
    ]
