"""A shard's tar, read once from first byte to last as any WebDataset reader would, and held to its index."""

import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from isal import isal_zlib

from common.shards.index import FIELDS, ShardIndex
from data_prep.audit.checks import Tally

_, TS, REX, _ = FIELDS
KEY = re.compile(r"(?P<volume>.+)_(?P<z>[0-9]{4})")


class Sample(NamedTuple):
    """The members of one slice that are as they were written.

    Args:
        volume_id: place of the volume in the index.
        z: slice, from the feet.
        row: of the slice in the index.
        data: by field; damaged members are left out.
        fields: that a slice of its volume has.
    """

    volume_id: int
    z: int
    row: int
    data: dict[str, bytes]
    fields: frozenset[str]


def read_samples(path: Path, index: ShardIndex, tally: Tally) -> Iterator[Sample]:
    """Yield the slices as they lie in the tar, and check names, places, bytes and order of its members.

    Args:
        path: of the tar.
        index: that belongs to it.
        tally: told of every member, the missing ones included.
    """
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
        what = f"slice {z}: {field} must be {size} bytes at {offset} by the index, got {found}"
        tally.fail("members", where, what)
        return False
    tally.saw("checksums")
    if isal_zlib.crc32(data) != index.member_crc32[row, column]:
        tally.fail("checksums", where, f"slice {z}: {field} has other bytes than were written")
        return False
    return True


def check_order(names: Sequence[str], shard: str, tally: Tally) -> None:
    """Check that slices lie one after the other from the feet to the head, volume by volume.

    Args:
        names: of the members, as they lie in the tar; the index is not asked.
        shard: its name.
        tally: told of every slice.
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
            tally.fail("order", volume, f"it goes on with slice {z} after another volume in {shard}")
        elif z != 0:
            tally.fail("order", volume, f"it begins with slice {z} in {shard}")
        begun.add(volume)
        before = volume, z
