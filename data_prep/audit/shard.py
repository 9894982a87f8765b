"""One shard: its tar held to its index, its records read, and the volumes of a random share decoded."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.ct.geometry import STORED_HU_RANGE
from common.shards.codec import MASK_SIZE_PX, NUM_TS_CLASSES, REX_CODES, decode_ct, decode_mask
from common.shards.index import FIELDS, SCHEMA_VERSION, UNLABELLED, ShardIndex, load_index
from data_prep.audit.checks import Tally
from data_prep.audit.tar import Sample, read_samples
from data_prep.audit.volume import VolumeContent, VolumeDecoder

CT, TS, REX, JSON = FIELDS


class ShardTask(NamedTuple):
    """What to audit.

    Args:
        path: of the tar.
        share: of the volumes to decode; names, places, bytes, order and records are checked of all.
        seed: of their choice.
    """

    path: Path
    share: float = 1.0
    seed: int = 0


class ShardAudit(NamedTuple):
    """What came of it.

    Args:
        tally: of the checks.
        contents: of the decoded volumes of which nothing is damaged, by name.
    """

    tally: Tally
    contents: dict[str, VolumeContent]


def draw(volume: str, seed: int) -> float:
    """Return a volume's own random number in [0, 1), whatever other volumes there are."""
    return int.from_bytes(sha256(f"{seed}/{volume}".encode()).digest()[:8], "big") / 2**64


def audit_shard(task: ShardTask) -> ShardAudit:
    """Read a shard and check everything about it that takes no other shard.

    Args:
        task: what to audit.

    Returns:
        What came of it.

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
        what = f"{where}: its record must be a JSON object, got {type(error).__name__}"
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
    """The record of a slice by the index, without rex_codes."""
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
    """Decode a slice; a volume is complete only if nothing of it is damaged."""
    where = str(index.volume[sample.volume_id])
    ct, ts, rex = None, None, None
    if CT in sample.data:
        tally.saw("ct")
        try:
            ct = _ct(sample.data[CT], decoder.shape)
        except ValueError as error:
            tally.fail("ct", where, f"slice {sample.z}: {error}")
    try:
        ts = _ts(sample, index, tally)
        rex = _rex(sample, record, index, tally)
    except ValueError as error:
        tally.fail("masks", where, f"slice {sample.z}: {error}")
        return
    if ct is not None and sample.fields == sample.data.keys():
        decoder.add(sample.z, ct, ts, rex)


def _ct(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    ct = decode_ct(data)
    if ct.shape != shape:
        raise ValueError(f"must have shape {shape} by the index, got {ct.shape}")
    low, high = int(ct.min()), int(ct.max())
    if low < STORED_HU_RANGE[0] or high > STORED_HU_RANGE[1]:
        raise ValueError(f"HU must lie in {STORED_HU_RANGE}, got {low} to {high}")
    return ct


def _ts(sample: Sample, index: ShardIndex, tally: Tally) -> np.ndarray | None:
    if TS not in sample.data:
        return None
    tally.saw("masks")
    ts = _mask(sample.data[TS], np.uint8, NUM_TS_CLASSES, TS)
    if ts.any() != index.slice_has_ts[sample.row]:
        raise ValueError(f"{TS} has organs: {bool(ts.any())}, the index says otherwise")
    return ts


def _rex(sample: Sample, record: Mapping[str, Any], index: ShardIndex, tally: Tally) -> np.ndarray | None:
    if REX not in sample.data:
        return None
    tally.saw("masks")
    rex = _mask(sample.data[REX], np.uint16, 1 << len(REX_CODES), REX)
    if rex.any() != index.slice_has_rex[sample.row]:
        raise ValueError(f"{REX} has findings: {bool(rex.any())}, the index says otherwise")
    bits = int(np.bitwise_or.reduce(rex, axis=None))
    present = [code for bit, code in enumerate(REX_CODES) if bits >> bit & 1]
    stated = record.get("rex_codes")
    if stated is not None and stated != present:  # a record without them is reported as a record
        raise ValueError(f"{REX} has the findings {present}, its record says {stated}")
    return rex


def _mask(data: bytes, dtype: type[np.generic], limit: int, field: str) -> np.ndarray:
    mask = decode_mask(data)
    size = (MASK_SIZE_PX, MASK_SIZE_PX)
    if mask.shape != size or mask.dtype != dtype or mask.max() >= limit:
        raise ValueError(
            f"{field} must be {np.dtype(dtype)} of shape {size} below {limit}, "
            f"got {mask.dtype} {mask.shape} up to {mask.max()}"
        )
    return mask
