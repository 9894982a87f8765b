"""One shard: its tar compared with its index, its records read, and a random share of its volumes decoded.

The tar is read once from the first byte to the last, as any WebDataset reader would.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from common.ct.geometry import STORED_HU_RANGE
from common.shards.codec import MASK_SIZE_PX, NUM_TS_CLASSES, REX_CODES, decode_ct, decode_mask
from common.shards.index import FIELDS, SCHEMA_VERSION, UNLABELLED, ShardIndex, load_index
from data_prep.audit.checks import Tally
from data_prep.audit.volume import VolumeContent, VolumeDecoder

CT, TS, REX, JSON = FIELDS
KEY = re.compile(r"(?P<volume>.+)_(?P<z>[0-9]{4})")


class ShardTask(NamedTuple):
    """A shard to audit.

    Args:
        path: path of the tar.
        share: share of the volumes to decode; names, places, bytes, order and records of all are checked.
        seed: seed of their choice.
    """

    path: Path
    share: float = 1.0
    seed: int = 0


class Sample(NamedTuple):
    """The undamaged members of one slice.

    Args:
        volume_id: position of the volume in the index.
        z: slice, from the feet.
        row: position of the slice in the index.
        data: bytes of each member by field, without damaged ones.
        fields: fields that every slice of the volume has.
    """

    volume_id: int
    z: int
    row: int
    data: dict[str, bytes]
    fields: frozenset[str]


class ShardAudit(NamedTuple):
    """The outcome for a shard: the checks, and the content of each undamaged decoded volume by name."""

    tally: Tally
    contents: dict[str, VolumeContent]


def draw(volume: str, seed: int) -> float:
    """Return a random number in [0, 1) that depends on the volume and the seed alone."""
    return int.from_bytes(sha256(f"{seed}/{volume}".encode()).digest()[:8], "big") / 2**64


def audit_shard(task: ShardTask) -> ShardAudit:
    """Read a shard and check everything that needs no other shard.

    Raises:
        FileNotFoundError: if the shard or its index is missing.
        ValueError: if the index cannot be used.
    """
    index = load_index(task.path)
    tally = Tally()
    decoders = {
        i: _decoder(index, i)
        for i, volume in enumerate(index.volume)
        if draw(str(volume), task.seed) < task.share
    }
    contents: dict[str, VolumeContent] = {}
    for sample in read_samples(task.path, index, tally):
        record = _checked_record(sample, index, tally)
        decoder = decoders.get(sample.volume_id)
        if decoder is not None:
            _decode(sample, record, index, decoder, tally)
            if not decoder.missing:
                contents[str(index.volume[sample.volume_id])] = decoder.content()
                del decoders[sample.volume_id]
    return ShardAudit(tally, contents)


def _decoder(index: ShardIndex, i: int) -> VolumeDecoder:
    height, width = index.shape[i].tolist()
    x, y, z = index.spacing_mm[i].tolist()
    return VolumeDecoder(int(index.num_slices[i]), (height, width), (x, y, z), bool(index.has_ts[i]))


def _checked_record(sample: Sample, index: ShardIndex, tally: Tally) -> Mapping[str, Any]:
    """Return the record of a slice, empty where it is damaged."""
    if JSON not in sample.data:
        return {}
    tally.saw("records")
    expected = _expected_record(index, sample)
    where = f"slice {sample.z}"
    try:
        record = dict(json.loads(sample.data[JSON]))
    except (ValueError, TypeError) as error:
        what = f"{where}: its record is not a JSON object ({type(error).__name__})"
        tally.fail("records", expected["volume"], what)
        return {}
    names = sorted(record.keys() - {"rex_codes"} | expected.keys())
    wrong = [name for name in names if record.get(name, ...) != expected.get(name, ...)]
    if (record.get("rex_codes") is not None) != bool(index.has_rex[sample.volume_id]):
        wrong.append("rex_codes")
    if wrong:
        tally.fail("records", expected["volume"], f"{where}: the index has another {', '.join(wrong)}")
    return record


def _expected_record(index: ShardIndex, sample: Sample) -> Mapping[str, Any]:
    """The record of a slice according to the index, without rex_codes."""
    i = sample.volume_id
    values = index.labels[i].tolist()
    labelled = len(values) > 0 and UNLABELLED not in values
    return {
        "schema_version": SCHEMA_VERSION,
        "volume": str(index.volume[i]),
        "slice_index": sample.z,
        "num_slices": int(index.num_slices[i]),
        "spacing_mm": index.spacing_mm[i].tolist(),
        "original_shape": index.original_shape[i].tolist(),
        "original_axcodes": str(index.original_axcodes[i]),
        "labels": dict(zip(index.label_names.tolist(), values, strict=True)) if labelled else None,
        "split": str(index.split),
    }


def _decode(
    sample: Sample, record: Mapping[str, Any], index: ShardIndex, decoder: VolumeDecoder, tally: Tally
) -> None:
    """Decode a slice; only volumes without any damage are complete in the end."""
    where = str(index.volume[sample.volume_id])
    ct = None
    if CT in sample.data:
        tally.saw("ct")
        try:
            ct = _ct(sample.data[CT], decoder.shape)
        except ValueError as error:
            tally.fail("ct", where, f"slice {sample.z}: {error}")
    try:
        masks = _masks(sample, record, index, tally)
    except ValueError as error:
        tally.fail("masks", where, f"slice {sample.z}: {error}")
        return
    if ct is not None and sample.fields == sample.data.keys():
        decoder.add(sample.z, ct, masks.get(TS), masks.get(REX))


def _ct(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    ct = decode_ct(data)
    if ct.shape != shape:
        raise ValueError(f"its shape is {ct.shape}, in the index {shape}")
    low, high = int(ct.min()), int(ct.max())
    if low < STORED_HU_RANGE[0] or high > STORED_HU_RANGE[1]:
        raise ValueError(f"HU must lie in {STORED_HU_RANGE}, got {low} to {high}")
    return ct


def _masks(
    sample: Sample, record: Mapping[str, Any], index: ShardIndex, tally: Tally
) -> dict[str, np.ndarray]:
    masks = {}
    size = (MASK_SIZE_PX, MASK_SIZE_PX)
    for field, dtype, limit, present in (
        (TS, np.uint8, NUM_TS_CLASSES, index.slice_has_ts),
        (REX, np.uint16, 1 << len(REX_CODES), index.slice_has_rex),
    ):
        if field not in sample.data:
            continue
        tally.saw("masks")
        masks[field] = mask = decode_mask(sample.data[field])
        if mask.shape != size or mask.dtype != dtype or mask.max() >= limit:
            raise ValueError(
                f"{field} must be {np.dtype(dtype)} of shape {size} below {limit}, "
                f"got {mask.dtype} {mask.shape} up to {mask.max()}"
            )
        if mask.any() != present[sample.row]:
            raise ValueError(f"{field} is {'not ' if mask.any() else ''}empty, the index says otherwise")
    stated = record.get("rex_codes")
    if REX in masks and stated is not None:  # a record without them is reported as a record
        bits = int(np.bitwise_or.reduce(masks[REX], axis=None))
        found = [code for bit, code in enumerate(REX_CODES) if bits >> bit & 1]
        if stated != found:
            raise ValueError(f"{REX} has the findings {found}, its record says {stated}")
    return masks


def read_samples(path: Path, index: ShardIndex, tally: Tally) -> Iterator[Sample]:
    """Yield a tar's slices in their order, and check names, places, bytes and order of its members."""
    expected = _expected_members(index)
    names = []
    sample: Sample | None = None
    for member, data in _members(path):
        names.append(member.name)
        tally.saw("members")
        place = expected.pop(member.name, None)
        if place is None:
            tally.fail("members", path.name, f"'{member.name}' is not in the index, or twice in the tar")
            continue
        volume_id, z, row, field = place
        if sample is None or sample.row != row:
            if sample is not None:
                yield sample
            sample = Sample(volume_id, z, row, {}, _fields(index, volume_id))
        if _is_as_written(member, data, index, place, tally):
            sample.data[field] = data
    if sample is not None:
        yield sample
    for volume_id, z, _, field in expected.values():
        tally.fail("members", str(index.volume[volume_id]), f"slice {z}: {field} is not in {path.name}")
    check_order(names, path.name, tally)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        for member in tar:
            file.seek(member.offset_data)
            yield member, file.read(member.size)


def _fields(index: ShardIndex, volume_id: int) -> frozenset[str]:
    """Fields of every slice of a volume."""
    absent = {TS: not index.has_ts[volume_id], REX: not index.has_rex[volume_id]}
    return frozenset(field for field in FIELDS if not absent.get(field, False))


def _expected_members(index: ShardIndex) -> dict[str, tuple[int, int, int, str]]:
    """Volume, slice, row and field of every member's name."""
    places = (
        (volume_id, z, int(first) + z)
        for volume_id, first in enumerate(index.first_sample)
        for z in range(int(index.num_slices[volume_id]))
    )
    return {
        f"{index.volume[volume_id]}_{z:04d}.{field}": (volume_id, z, row, field)
        for volume_id, z, row in places
        for field in _fields(index, volume_id)
    }


def _is_as_written(
    member: tarfile.TarInfo, data: bytes, index: ShardIndex, place: tuple[int, int, int, str], tally: Tally
) -> bool:
    volume_id, z, row, field = place
    where, column = str(index.volume[volume_id]), FIELDS.index(field)
    offset, size = int(index.member_offset[row, column]), int(index.member_size[row, column])
    if not member.isreg() or (member.offset_data, member.size) != (offset, size):
        found = f"{member.size} bytes at {member.offset_data}"
        what = f"slice {z}: {field} is {found}, in the index {size} bytes at {offset}"
        tally.fail("members", where, what)
        return False
    tally.saw("checksums")
    if isal_zlib.crc32(data) != index.member_crc32[row, column]:
        tally.fail("checksums", where, f"slice {z}: {field} has other bytes than were written")
        return False
    return True


def check_order(names: Sequence[str], shard: str, tally: Tally) -> None:
    """Check that slices follow one another from the feet to the head, volume by volume.

    Args:
        names: members in the order of the tar; the index plays no part.
        shard: name of the shard.
        tally: record of the checks.
    """
    keys = [key for key, _ in groupby(name.partition(".")[0] for name in names)]
    tally.saw("order", len(keys))
    before = ("", -1)
    begun: set[str] = set()
    for key in keys:
        match = KEY.fullmatch(key)
        volume, z = (match["volume"], int(match["z"])) if match else (key, 0)
        if volume == before[0]:
            if z != before[1] + 1:
                tally.fail("order", volume, f"slice {z} follows slice {before[1]} in {shard}")
        elif volume in begun:
            tally.fail("order", volume, f"it continues with slice {z} after another volume in {shard}")
        elif z != 0:
            tally.fail("order", volume, f"it begins with slice {z} in {shard}")
        begun.add(volume)
        before = volume, z
