"""Consecutive slices of a volume as they are stored: found by the index, checked, decoded when asked for.

Shapes: N slices, H rows, W columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from common.shards.codec import decode_ct, decode_mask
from common.shards.index import FIELDS, ShardIndex
from common.shards.volume import MASK_SIZE_PX
from common.shards.volume_entry import VolumeEntry


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
