"""Reads shards, the only contract of data_prep and training.

A shard is an ordinary WebDataset tar: one sample per axial slice, the slices of a volume consecutive from the
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
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from common.shards.codec import MASK_SIZE_PX, decode_ct, decode_mask
from common.shards.index import FIELDS, ShardIndex, VolumeEntry, load_index, volume_entries

logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"(?P<split>[A-Za-z0-9]+)-(?P<rex>rex-)?(?P<number>[0-9]{6})\.tar")
PARTS = ".parts"
"""Folder of volumes that wait for the others of their shard while data_prep runs."""


class ShardName(NamedTuple):
    """What the name of a shard says: the split of its volumes, and whether these are ReX-annotated."""

    split: str
    annotated: bool


def parse_shard_name(name: str) -> ShardName:
    """Return what a shard's name says.

    Raises:
        ValueError: if this is not the name of a shard.
    """
    match = SHARD_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"shard must be named <split>-000000.tar or <split>-rex-000000.tar, got '{name}'.")
    return ShardName(match["split"], match["rex"] is not None)


class Slab(NamedTuple):
    """Consecutive slices of a volume, read from their shard and decoded on demand.

    Args:
        entry: the volume.
        shard_index: index of its shard.
        z0: first slice, from the feet.
        n: number of slices.
        data: bytes of all its members.
        start: place of ``data`` in the tar.
    """

    entry: VolumeEntry
    shard_index: ShardIndex
    z0: int
    n: int
    data: bytes
    start: int

    def read_ct(self, z: int) -> np.ndarray:
        """Decode one CT slice, counted from the first of the slab, as int16 HU ``(H, W)``.

        Raises:
            ValueError: if the shard is damaged there; so do ``read_ts`` and ``read_rex``.
        """
        return self._decoded(z, "ct.blosc2")

    def read_ts(self) -> np.ndarray | None:
        """Decode TotalSegmentator ids, uint8 ``(N, 128, 128)``; None without a label map."""
        return self._planes("ts.png", self.shard_index.slice_has_ts, np.uint8) if self.entry.has_ts else None

    def read_rex(self) -> np.ndarray | None:
        """Decode findings, uint16 ``(N, 128, 128)``, bit k for ``REX_CODES[k]``; None if not annotated."""
        return (
            self._planes("rex.png", self.shard_index.slice_has_rex, np.uint16) if self.entry.has_rex else None
        )

    def _planes(self, field: str, present: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        """Masks of all slices; empty ones are known from the index and not decoded."""
        planes = np.zeros((self.n, MASK_SIZE_PX, MASK_SIZE_PX), dtype)
        row = self.entry.first_sample + self.z0
        for z in np.flatnonzero(present[row : row + self.n]):
            planes[z] = self._decoded(int(z), field)
        return planes

    def _decoded(self, z: int, field: str) -> np.ndarray:
        member = self.entry.first_sample + self.z0 + z, FIELDS.index(field)
        first = int(self.shard_index.member_offset[member]) - self.start
        data = self.data[first : first + int(self.shard_index.member_size[member])]
        try:
            if isal_zlib.crc32(data) != self.shard_index.member_crc32[member]:
                raise ValueError(f"its {len(data)} bytes are not those that were written.")
            return decode_ct(data) if field == "ct.blosc2" else decode_mask(data)
        except ValueError as error:
            raise ValueError(
                f"'{self.entry.shard}' is damaged at {field} of slice {self.z0 + z} "
                f"of volume '{self.entry.volume}': {error} Delete the shard and run data_prep again."
            ) from error


class ShardSet:
    """All shards of one split, every slab of which is one read away.

    Holds the indices only, about 70 bytes per slice. Safe to fork, to pickle and to share between threads:
    reads state their position. A process keeps at most 256 shards open, whatever the size of the cohort.

    Args:
        dataset_dir: folder of the shards and their indices.
        split: such as ``train``.

    Attributes:
        volumes: the volumes in the order of the shards' names; ``volume_id`` counts along it.

    Raises:
        FileNotFoundError: if the folder, a shard of the split, or an index is missing.
        ValueError: if an index is damaged, of another schema version or does not belong to its shard, or a
            volume lies in two shards.
    """

    def __init__(self, dataset_dir: str | Path, split: str) -> None:
        self.volumes: list[VolumeEntry] = []
        self._indices: dict[str, ShardIndex] = {}
        self._identities: dict[str, tuple[int, int]] = {}
        for shard in _shards_of(Path(dataset_dir), split):
            index = load_index(shard)
            state = shard.stat()
            self._indices[str(shard)] = index
            self._identities[str(shard)] = (state.st_ino, state.st_mtime_ns)
            self.volumes.extend(volume_entries(str(shard), index))
        shard_of: dict[str, str] = {}
        for entry in self.volumes:
            if entry.volume in shard_of:
                shards = f"'{shard_of[entry.volume]}' and '{entry.shard}'"
                raise ValueError(f"Volume '{entry.volume}' lies in two shards, {shards}.")
            shard_of[entry.volume] = entry.shard

    def read_slab(self, volume_id: int, z0: int, n: int) -> Slab:
        """Read consecutive slices and their masks in one read of the disk; decode them where needed.

        Args:
            volume_id: place in ``volumes``.
            z0: first slice, from the feet.
            n: number of slices.

        Raises:
            ValueError: if the volume has no such slices.
        """
        entry = self.volumes[volume_id]
        if not (0 <= z0 < z0 + n <= entry.num_slices):
            raise ValueError(
                f"slices must lie in 0..{entry.num_slices - 1}, got {z0}..{z0 + n - 1} "
                f"for volume '{entry.volume}'."
            )
        index = self._indices[entry.shard]
        rows = slice(entry.first_sample + z0, entry.first_sample + z0 + n)
        offsets = index.member_offset[rows]
        start = int(offsets[0, 0])
        size = int((offsets + index.member_size[rows]).max()) - start
        shard = _opened(entry.shard, self._identities[entry.shard])
        return Slab(entry, index, z0, n, os.pread(shard.descriptor, size, start), start)


def _shards_of(folder: Path, split: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder of shards '{folder}'. Write them with data_prep.")
    named = {path: SHARD_NAME.fullmatch(path.name) for path in sorted(folder.iterdir())}
    splits = sorted({name["split"] for name in named.values() if name})
    shards = [path for path, name in named.items() if name and name["split"] == split]
    if not shards:
        raise FileNotFoundError(f"No shards of split '{split}' in '{folder}'; it has splits {splits}.")
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
    """Open a shard once per process; a file replaced since has another identity (inode, time of change)."""
    return _OpenShard(path)
