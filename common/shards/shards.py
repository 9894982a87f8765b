"""The shard schema, written and read here: the only contract of data_prep and training.

A shard is an ordinary WebDataset tar: one sample an axial slice, the slices of a volume consecutive from the
feet to the head, volumes never split over shards. Members of sample ``train_1_a_1_0050``:

- ``.ct.blosc2``: int16 HU within ``STORED_HU_RANGE``; a Blosc2 array frame, which knows its shape and type.
- ``.ts.png``: 8-bit 128 x 128 TotalSegmentator ids; absent where the volume has no label map.
- ``.rex.png``: 16-bit 128 x 128, bit k for ReXGroundingCT's k-th code; absent where a scan is not annotated.
- ``.json``: schema_version, volume, slice_index, num_slices, spacing_mm (x, y, z), original_shape and
  original_axcodes of the source, labels (name to 0 or 1, or null), rex_codes (in this slice, or null), split.

Shards are ``<split>-000000.tar`` and, for annotated scans, ``<split>-rex-000000.tar``. Beside each,
``<name>.index.npz`` makes every slice one read away.
"""

import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from common.ct.rejection import RejectedVolume
from common.run.process import atomic_file
from common.shards.codec import MASK_SIZE_PX, VolumeSlices, add_volume, decode_ct, decode_mask
from common.shards.index import (
    FIELDS,
    IndexBuilder,
    ShardIndex,
    VolumeEntry,
    index_path,
    load_index,
    save_index,
    volume_entries,
)


class StoredSlab(NamedTuple):
    """Consecutive slices of a volume in a shard.

    Args:
        entry: the volume.
        shard_index: of its shard.
        z0: first slice, from the feet.
        n: number of slices.
        fetch: returns the bytes of the tar from a place, so many of them.
    """

    entry: VolumeEntry
    shard_index: ShardIndex
    z0: int
    n: int
    fetch: Callable[[int, int], bytes]

    def extent(self) -> tuple[int, int]:
        """Return the first byte of the members of all slices in the tar, and how many bytes they span."""
        rows = slice(self._row, self._row + self.n)
        offsets = self.shard_index.member_offset[rows]
        start = int(offsets[0, 0])
        return start, int((offsets + self.shard_index.member_size[rows]).max()) - start

    def read_ct(self, z: int) -> np.ndarray:
        """Decode one CT slice, counted from the first of the slab, as int16 HU ``(H, W)``.

        Raises:
            ValueError: if the shard is damaged there.
        """
        return self._decoded(z, "ct.blosc2")

    def read_ts(self) -> np.ndarray | None:
        """Decode the TotalSegmentator ids of all slices as uint8 ``(N, 128, 128)``; None without a label map.

        Raises:
            ValueError: if the shard is damaged there.
        """
        return self._planes("ts.png", np.uint8) if self.entry.has_ts else None

    def read_rex(self) -> np.ndarray | None:
        """Decode the findings of all slices as uint16 ``(N, 128, 128)``; None where not annotated.

        Raises:
            ValueError: if the shard is damaged there.
        """
        return self._planes("rex.png", np.uint16) if self.entry.has_rex else None

    @property
    def _row(self) -> int:
        return self.entry.first_sample + self.z0

    def _planes(self, field: str, dtype: type[np.generic]) -> np.ndarray:
        """Masks of all slices; empty ones are known from the index and not decoded."""
        present = self.shard_index.slice_has_ts if field == "ts.png" else self.shard_index.slice_has_rex
        planes = np.zeros((self.n, MASK_SIZE_PX, MASK_SIZE_PX), dtype)
        for z in np.flatnonzero(present[self._row : self._row + self.n]):
            planes[z] = self._decoded(int(z), field)
        return planes

    def _decoded(self, z: int, field: str) -> np.ndarray:
        member = self._row + z, FIELDS.index(field)
        data = self.fetch(
            int(self.shard_index.member_offset[member]), int(self.shard_index.member_size[member])
        )
        try:
            if isal_zlib.crc32(data) != self.shard_index.member_crc32[member]:
                raise ValueError(f"its {len(data)} bytes are not those that were written.")
            return decode_ct(data) if field == "ct.blosc2" else decode_mask(data)
        except ValueError as error:
            raise ValueError(
                f"'{self.entry.shard}' is damaged at {field} of slice {self.z0 + z} "
                f"of volume '{self.entry.volume}': {error} Delete the shard and run data_prep again."
            ) from error


logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"(?P<split>[A-Za-z0-9]+)-(?P<rex>rex-)?(?P<number>[0-9]{6})\.tar")
PARTS = ".parts"
"""Folder of volumes that wait for the others of their shard while data_prep runs."""


class ShardName(NamedTuple):
    """What the name of a shard says.

    Args:
        split: of its volumes.
        annotated: whether it holds the scans annotated by ReXGroundingCT.
    """

    split: str
    annotated: bool


def write_shard(
    path: str | Path, volumes: Iterable[VolumeSlices | RejectedVolume], plan: str = ""
) -> ShardIndex:
    """Write one shard and its index: both are there in full or not at all, the index last.

    Volumes are taken one at a time, so that one of them is in memory. The same volumes give the same bytes.

    Args:
        path: ``<split>-000000.tar``, or ``<split>-rex-000000.tar`` for annotated scans.
        volumes: in the order in which they are to lie in the shard.
        plan: fingerprint of what the shard is to hold, kept in the index for a later run to compare.

    Returns:
        The index.

    Raises:
        ValueError: if the shard's name or a volume does not follow the schema, or a volume comes twice.
    """
    shard = Path(path)
    return write_tar(shard, parse_shard_name(shard.name), volumes, plan)


def parse_shard_name(name: str) -> ShardName:
    """Return what a shard's name says.

    Raises:
        ValueError: if no shard is named so.

    Example:
        >>> parse_shard_name("train-rex-000012.tar")
        ShardName(split='train', annotated=True)
    """
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"shard must be named <split>-000000.tar or <split>-rex-000000.tar, got '{name}'.")
    return ShardName(match["split"], match["rex"] is not None)


def write_tar(
    tar_path: Path, name: ShardName, volumes: Iterable[VolumeSlices | RejectedVolume], plan: str
) -> ShardIndex:
    """Do as ``write_shard`` under any name of the file, on behalf of the shard it will be a part of.

    Args:
        tar_path: the file; its index goes beside it.
        name: of the shard.
        volumes: see ``write_shard``.
        plan: see ``write_shard``.

    Returns:
        The index.

    Raises:
        ValueError: if a volume does not follow the schema, or comes twice.
    """
    index_path(tar_path).unlink(missing_ok=True)
    builder = IndexBuilder(name.split)
    with (
        atomic_file(tar_path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for volume in volumes:
            if isinstance(volume, RejectedVolume):
                builder.rejected.append(volume)
                continue
            add_volume(tar, builder, volume, name.annotated)
    index = builder.build(plan, tar_bytes=tar_path.stat().st_size)
    save_index(tar_path, index)
    return index


class ShardSet:
    """All shards of one split, every slice of which is one read away.

    Holds the indices only, about 70 bytes a slice. Safe to fork, to pickle and to share between threads:
    reads state their position. A process keeps at most 256 shards open, whatever the size of the cohort.

    Args:
        folder: where the shards and their indices are.
        split: such as ``train``.

    Attributes:
        volumes: what there is, in the order of the shards' names; ``volume_id`` counts along it.

    Raises:
        FileNotFoundError: if the folder, a shard of the split, or an index is missing.
        ValueError: if an index is damaged, of another schema version or does not belong to its shard, or a
            volume lies in two shards.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder = Path(folder)
        self.split = split
        self.volumes: list[VolumeEntry] = []
        self._indices: dict[str, ShardIndex] = {}
        self._identities: dict[str, tuple[int, int]] = {}
        for shard in _shards_of(self.folder, split):
            index = load_index(shard)
            state = shard.stat()
            self._indices[str(shard)] = index
            self._identities[str(shard)] = (state.st_ino, state.st_mtime_ns)
            self.volumes.extend(volume_entries(str(shard), index))
        shard_of: dict[str, str] = {}
        for entry in self.volumes:
            if entry.volume in shard_of:
                shards = f"'{shard_of[entry.volume]}' and '{entry.shard}'"
                raise ValueError(f"a volume must lie in one shard, got {shards} for volume '{entry.volume}'.")
            shard_of[entry.volume] = entry.shard

    def read_ct(self, volume_id: int, z: int) -> np.ndarray:
        """Read one CT slice.

        Args:
            volume_id: place in ``volumes``.
            z: slice, from the feet.

        Returns:
            int16 HU ``(H, W)``.

        Raises:
            ValueError: if the volume has no such slice, or the shard is damaged there.
        """
        return self._slab(volume_id, z, 1).read_ct(0)

    def read_ts(self, volume_id: int, z0: int, n: int) -> np.ndarray | None:
        """Read the TotalSegmentator ids of consecutive slices.

        Args:
            volume_id: place in ``volumes``.
            z0: first slice, from the feet.
            n: number of slices.

        Returns:
            uint8 ``(n, 128, 128)``, or None where the volume has no label map.

        Raises:
            ValueError: if the volume has no such slices, or the shard is damaged there.
        """
        return self._slab(volume_id, z0, n).read_ts()

    def read_rex(self, volume_id: int, z0: int, n: int) -> np.ndarray | None:
        """Read the finding masks of consecutive slices.

        Args:
            volume_id: place in ``volumes``.
            z0: first slice, from the feet.
            n: number of slices.

        Returns:
            uint16 ``(n, 128, 128)``, bit k for ``REX_CODES[k]``, or None where the scan is not annotated.

        Raises:
            ValueError: if the volume has no such slices, or the shard is damaged there.
        """
        return self._slab(volume_id, z0, n).read_rex()

    def read_slab(self, volume_id: int, z0: int, n: int) -> StoredSlab:
        """Read consecutive slices and their masks in one read of the disk; decode them where needed.

        Args:
            volume_id: place in ``volumes``.
            z0: first slice, from the feet.
            n: number of slices.

        Raises:
            ValueError: if the volume has no such slices.
        """
        slab = self._slab(volume_id, z0, n)
        start, size = slab.extent()
        data = slab.fetch(start, size)
        return slab._replace(fetch=lambda offset, size: data[offset - start : offset - start + size])

    def _slab(self, volume_id: int, z0: int, n: int) -> StoredSlab:
        """Consecutive slices whose members are read from the disk one by one."""
        entry = self.volumes[volume_id]
        if not (0 <= z0 < z0 + n <= entry.num_slices):
            raise ValueError(
                f"slices must lie in 0..{entry.num_slices - 1}, got {z0}..{z0 + n - 1} "
                f"for volume '{entry.volume}'."
            )
        shard = _opened(entry.shard, self._identities[entry.shard])
        return StoredSlab(
            entry,
            self._indices[entry.shard],
            z0,
            n,
            lambda start, size: os.pread(shard.descriptor, size, start),
        )


def _shards_of(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"shards must be in a folder, got '{folder}', which is none. Write them with data_prep."
        )
    named = {path: SHARD_NAME.fullmatch(path.name) for path in sorted(folder.iterdir())}
    splits = sorted({name["split"] for name in named.values() if name})
    shards = [path for path, name in named.items() if name and name["split"] == split]
    if not shards:
        raise FileNotFoundError(f"'{folder}' must hold shards of split '{split}', got splits {splits}.")
    partial = [path.name for path in named if path.name.endswith(".partial") or path.name == PARTS]
    if partial:
        logger.warning(
            "'%s' holds unfinished files %s: data_prep still runs or was interrupted.", folder, partial
        )
    return shards


class _OpenShard:
    """An open file that closes itself once nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=256)
def _opened(path: str, identity: tuple[int, int]) -> _OpenShard:
    """Open a shard once a process; a file replaced since has another identity (inode, time of change)."""
    return _OpenShard(path)
