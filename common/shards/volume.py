"""One volume as members of a shard.

Shapes: Z slices of the volume, H rows, W columns.
"""

import io
import json
import math
import tarfile
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from common.ct.names import VOLUME_NAME
from common.labels import load_labels
from common.shards.codec import encode_ct, encode_mask
from common.shards.index import ABSENT_MEMBER, FIELDS, SCHEMA_VERSION, IndexBuilder

MASK_SIZE_PX = 128
NUM_TS_CLASSES = len(load_labels("totalsegmentator"))
REX_CODES = tuple(label.code for label in load_labels("rexgroundingct"))
MAX_SLICES = 10_000  # four digits in a sample's key


class VolumeSlices(NamedTuple):
    """One volume on its way into a shard.

    Args:
        volume: name; letters, digits, ``_`` and ``-``, at most 80.
        ct: ``(Z, H, W)`` int16 HU.
        ts: ``(Z, 128, 128)`` uint8 TotalSegmentator ids, or None without a label map.
        rex: ``(Z, 128, 128)`` uint16 bit planes, or None where the scan is not annotated.
        spacing_mm: as (x, y, z).
        original_shape: of the array in the source.
        original_axcodes: of the array in the source, such as ``LPS``.
        labels: class name to 0 or 1, or None.
        split: such as ``train``.
        source: path of the CT, of a DICOM series its folder, relative to the input folder.
        source_sha256: of the CT's bytes; of several files, of their digests in order.
        doubts: what makes it unlike a chest CT, as text; empty where nothing does.
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


def add_volume(tar: tarfile.TarFile, builder: IndexBuilder, volume: VolumeSlices, annotated: bool) -> None:
    """Append a volume to a shard that is being written, slice by slice, and note it in the index.

    Args:
        tar: open for writing, in the USTAR format.
        builder: index of the shard.
        volume: what to append.
        annotated: whether the shard is one of scans annotated by ReXGroundingCT.

    Raises:
        ValueError: if the name, an array's type or shape, a mask's values, labels, spacing or split do not
            follow the schema, or the volume is in the shard already.
    """
    _check_names(volume, builder.split)
    _check_arrays(volume, annotated)
    builder.add_volume(
        volume.volume,
        volume.labels,
        num_slices=len(volume.ct),
        spacing_mm=volume.spacing_mm,
        shape=volume.ct.shape[1:],
        original_shape=volume.original_shape,
        original_axcodes=volume.original_axcodes,
        source=volume.source,
        source_sha256=volume.source_sha256,
        doubts=volume.doubts,
        has_ts=volume.ts is not None,
        has_rex=volume.rex is not None,
    )
    for z in range(len(volume.ct)):
        ts = None if volume.ts is None else volume.ts[z]
        rex = None if volume.rex is None else volume.rex[z]
        contents = (
            encode_ct(volume.ct[z]),
            None if ts is None else encode_mask(ts),
            None if rex is None else encode_mask(rex),
            json.dumps(_slice_record(volume, z, rex)).encode(),
        )
        key = f"{volume.volume}_{z:04d}"
        members = [
            _add_member(tar, f"{key}.{field}", data) for field, data in zip(FIELDS, contents, strict=True)
        ]
        builder.add_slice(members, ts is not None and bool(ts.any()), rex is not None and bool(rex.any()))


def _check_names(volume: VolumeSlices, split: str) -> None:
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
    present = None if rex is None else int(np.bitwise_or.reduce(rex, axis=None))
    return {
        "schema_version": SCHEMA_VERSION,
        "volume": volume.volume,
        "slice_index": z,
        "num_slices": len(volume.ct),
        "spacing_mm": volume.spacing_mm,
        "original_shape": volume.original_shape,
        "original_axcodes": volume.original_axcodes,
        "labels": volume.labels,
        "rex_codes": None
        if present is None
        else [code for k, code in enumerate(REX_CODES) if present >> k & 1],
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
