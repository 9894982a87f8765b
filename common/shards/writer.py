"""Writes shards: a tar of slices and, beside it, the index of what lies where."""

import io
import json
import math
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from common.ct.files import VOLUME_NAME
from common.ct.rejection import RejectedVolume
from common.run.process import atomic_file
from common.shards.codec import MASK_SIZE_PX, NUM_TS_CLASSES, REX_CODES, encode_ct, encode_mask
from common.shards.index import (
    ABSENT,
    FIELDS,
    SCHEMA_VERSION,
    UNLABELLED,
    ShardIndex,
    index_path,
    save_index,
)
from common.shards.shards import ShardName, parse_shard_name

MAX_SLICES = 10_000  # four digits in a sample's key
ABSENT_MEMBER = (ABSENT, ABSENT, 0)
COLUMNS: dict[str, tuple[type, tuple[int, ...]]] = {
    "num_slices": (np.int64, ()),
    "spacing_mm": (np.float64, (3,)),
    "shape": (np.int64, (2,)),
    "original_shape": (np.int64, (3,)),
    "original_axcodes": (np.str_, ()),
    "source": (np.str_, ()),
    "source_sha256": (np.str_, ()),
    "doubts": (np.str_, ()),
    "has_ts": (np.bool_, ()),
    "has_rex": (np.bool_, ()),
}
"""Type and shape of a row in the columns of a ``ShardIndex`` that are taken as they are."""


class VolumeSlices(NamedTuple):
    """One volume on its way into a shard; fields that are not explained here are those of ``ShardIndex``.

    Args:
        volume: name; letters, digits, ``_`` and ``-``, at most 80.
        ct: ``(Z, H, W)`` int16 HU.
        ts: ``(Z, 128, 128)`` uint8 TotalSegmentator ids, or None without a label map.
        rex: ``(Z, 128, 128)`` uint16 bit planes, or None where the scan is not annotated.
        labels: class name to 0 or 1, or None.
    """

    volume: str
    ct: np.ndarray
    ts: np.ndarray | None
    rex: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    original_shape: tuple[int, int, int]
    original_axcodes: str
    labels: dict[str, int] | None
    split: str
    source: str = ""
    source_sha256: str = ""
    doubts: str = ""


def write_shard(
    path: str | Path, volumes: Iterable[VolumeSlices | RejectedVolume], plan: str = ""
) -> ShardIndex:
    """Write one shard and its index: both are there in full or not at all, the index last.

    Volumes are taken one at a time, so that only one is in memory. The same volumes give the same bytes.

    Args:
        path: ``<split>-000000.tar``, or ``<split>-rex-000000.tar`` for annotated scans.
        volumes: content of the shard, in order.
        plan: fingerprint of what the shard is to hold, kept in the index for a later run to compare.

    Raises:
        ValueError: if the shard's name or a volume does not follow the schema, or a volume comes twice.
    """
    return write_tar(Path(path), parse_shard_name(Path(path).name), volumes, plan)


def write_tar(
    tar_path: Path, name: ShardName, volumes: Iterable[VolumeSlices | RejectedVolume], plan: str
) -> ShardIndex:
    """Do as ``write_shard`` under any file name, for a part of a shard of the given name."""
    index_path(tar_path).unlink(missing_ok=True)
    content = _Content(name)
    with (
        atomic_file(tar_path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for volume in volumes:
            if isinstance(volume, RejectedVolume):
                content.rejected.append(volume)
            else:
                content.add(tar, volume)
    index = content.index(plan, tar_bytes=tar_path.stat().st_size)
    save_index(tar_path, index)
    return index


class _Content:
    """What has been written into a shard so far, without its pixels."""

    def __init__(self, name: ShardName) -> None:
        self.name = name
        self.volumes: dict[str, dict[str, Any]] = {}
        self.labels: list[dict[str, int] | None] = []
        self.rejected: list[RejectedVolume] = []
        self.members: list[list[tuple[int, int, int]]] = []
        self.slice_flags: list[tuple[bool, bool]] = []

    def add(self, tar: tarfile.TarFile, volume: VolumeSlices) -> None:
        """Append a volume to the tar, slice by slice."""
        _check_facts(volume, self.name.split)
        _check_arrays(volume, self.name.annotated)
        which = f"for volume '{volume.volume}'"
        if volume.volume in self.volumes:
            raise ValueError(f"Volume '{volume.volume}' comes twice in a shard.")
        if volume.labels is not None and list(volume.labels) != (self.label_names or list(volume.labels)):
            raise ValueError(
                f"labels must name the same classes in a shard, got {list(volume.labels)} {which}."
            )
        facts = {name: getattr(volume, name) for name in COLUMNS if name in volume._fields}
        facts |= {"num_slices": len(volume.ct), "shape": volume.ct.shape[1:]}
        facts |= {"has_ts": volume.ts is not None, "has_rex": volume.rex is not None}
        self.volumes[volume.volume] = facts
        self.labels.append(volume.labels)
        for z, ct in enumerate(volume.ct):
            ts, rex = (None if masks is None else masks[z] for masks in (volume.ts, volume.rex))
            contents = (
                encode_ct(ct),
                None if ts is None else encode_mask(ts),
                None if rex is None else encode_mask(rex),
                json.dumps(_slice_record(volume, z, rex)).encode(),
            )
            key = f"{volume.volume}_{z:04d}"
            self.members.append(
                [
                    _add_member(tar, f"{key}.{field}", data)
                    for field, data in zip(FIELDS, contents, strict=True)
                ]
            )
            self.slice_flags.append((ts is not None and bool(ts.any()), rex is not None and bool(rex.any())))

    @property
    def label_names(self) -> list[str]:
        """Classes of the first volume that has labels."""
        return next((list(labels) for labels in self.labels if labels is not None), [])

    def index(self, plan: str, tar_bytes: int) -> ShardIndex:
        """Return the index of the finished tar."""
        names, rows = self.label_names, list(self.volumes.values())
        labels = [[UNLABELLED] * len(names) if row is None else list(row.values()) for row in self.labels]
        members = np.array(self.members, np.int64).reshape(-1, len(FIELDS), 3)
        flags = np.array(self.slice_flags, bool).reshape(-1, 2)
        columns: dict[str, np.ndarray] = {
            name: np.array([row[name] for row in rows], dtype).reshape(-1, *shape)
            for name, (dtype, shape) in COLUMNS.items()
        }
        return ShardIndex(
            schema_version=np.int64(SCHEMA_VERSION),
            split=np.array(self.name.split),
            plan=np.array(plan),
            tar_bytes=np.int64(tar_bytes),
            member_offset=members[..., 0],
            member_size=members[..., 1].astype(np.int32),
            member_crc32=members[..., 2].astype(np.uint32),
            volume=np.array(list(self.volumes), np.str_),
            **columns,
            slice_has_ts=flags[:, 0],
            slice_has_rex=flags[:, 1],
            label_names=np.array(names, np.str_),
            labels=np.array(labels, np.int8).reshape(len(labels), len(names)),
            rejected_volume=np.array([row.volume for row in self.rejected], np.str_),
            rejected_reason=np.array([row.reason for row in self.rejected], np.str_),
            rejected_detail=np.array([row.detail for row in self.rejected], np.str_),
        )


def _check_facts(volume: VolumeSlices, split: str) -> None:
    which = f"for volume '{volume.volume}'"
    if not VOLUME_NAME.fullmatch(volume.volume):
        raise ValueError(f"volume must match {VOLUME_NAME.pattern}, got '{volume.volume}'. Rename its file.")
    if volume.split != split:
        raise ValueError(f"split must be '{split}' as in the shard's name, got '{volume.split}' {which}.")
    if not all(math.isfinite(mm) and mm > 0 for mm in volume.spacing_mm):
        raise ValueError(f"spacing_mm must be positive, got {volume.spacing_mm} {which}.")
    if volume.labels is not None and not set(volume.labels.values()) <= {0, 1}:
        raise ValueError(f"labels must be 0 or 1, got {volume.labels} {which}.")


def _check_arrays(volume: VolumeSlices, annotated: bool) -> None:
    which = f"for volume '{volume.volume}'"
    ct, ts, rex = volume.ct, volume.ts, volume.rex
    if ct.ndim != 3 or ct.dtype != np.int16 or ct.size == 0:
        raise ValueError(f"ct must be int16 of shape (Z, H, W), got {ct.dtype} {ct.shape} {which}.")
    if len(ct) > MAX_SLICES:
        raise ValueError(f"ct must have at most {MAX_SLICES} slices, got {len(ct)} {which}.")
    if (rex is not None) != annotated:
        raise ValueError(
            f"rex must be given in '-rex-' shards and only there, got {rex is not None} {which}."
        )
    planes = (len(ct), MASK_SIZE_PX, MASK_SIZE_PX)
    if ts is not None and (ts.shape != planes or ts.dtype != np.uint8 or ts.max() >= NUM_TS_CLASSES):
        raise ValueError(
            f"ts must be uint8 of shape {planes} with ids below {NUM_TS_CLASSES}, "
            f"got {ts.dtype} {ts.shape} up to {ts.max()} {which}."
        )
    if rex is not None and (rex.shape != planes or rex.dtype != np.uint16 or rex.max() >> len(REX_CODES)):
        raise ValueError(
            f"rex must be uint16 of shape {planes} with {len(REX_CODES)} bits, "
            f"got {rex.dtype} {rex.shape} up to {rex.max()} {which}."
        )


def _slice_record(volume: VolumeSlices, z: int, rex: np.ndarray | None) -> dict[str, object]:
    codes = None
    if rex is not None:
        present = int(np.bitwise_or.reduce(rex, axis=None))
        codes = [code for k, code in enumerate(REX_CODES) if present >> k & 1]
    return {
        "schema_version": SCHEMA_VERSION,
        "volume": volume.volume,
        "slice_index": z,
        "num_slices": len(volume.ct),
        "spacing_mm": volume.spacing_mm,
        "original_shape": volume.original_shape,
        "original_axcodes": volume.original_axcodes,
        "labels": volume.labels,
        "rex_codes": codes,
        "split": volume.split,
    }


def _add_member(tar: tarfile.TarFile, name: str, data: bytes | None) -> tuple[int, int, int]:
    """Append a member without owner or time, if there is one; return its first byte, size and CRC."""
    if data is None:
        return ABSENT_MEMBER
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return offset, member.size, isal_zlib.crc32(data)
