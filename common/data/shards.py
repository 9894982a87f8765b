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
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.atomic_file import atomic_file
from common.data.shard_index import (
    FIELDS,
    UNLABELLED,
    IndexBuilder,
    RejectedVolume,
    ShardIndex,
    index_path,
    load_index,
    save_index,
)
from common.data.shard_volume import MASK_SIZE_PX, VolumeSlices, add_volume
from common.data.slice_codec import decode_ct, decode_mask

logger = logging.getLogger(__name__)

SHARD_NAME = re.compile(r"(?P<split>[A-Za-z0-9]+)-(?P<rex>rex-)?(?P<number>[0-9]{6})\.tar")


class VolumeEntry(NamedTuple):
    """One volume of a shard set.

    Args:
        volume: name.
        shard: path of the tar.
        first_sample: place of its first slice in the shard.
        num_slices: its slices.
        spacing_mm: as (x, y, z).
        shape: height and width of its slices.
        has_ts: whether it has a TotalSegmentator label map.
        has_rex: whether it is annotated by ReXGroundingCT.
        labels: class name to 0 or 1, or None.
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
    name = SHARD_NAME.fullmatch(shard.name)
    if name is None:
        raise ValueError(
            f"shard must be named <split>-000000.tar or <split>-rex-000000.tar, got '{shard.name}'."
        )
    index_path(shard).unlink(missing_ok=True)
    builder = IndexBuilder(name["split"])
    with (
        atomic_file(shard) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for volume in volumes:
            if isinstance(volume, RejectedVolume):
                builder.rejected.append(volume)
                continue
            add_volume(tar, builder, volume, annotated=name["rex"] is not None)
    index = builder.build(plan, tar_bytes=shard.stat().st_size)
    save_index(shard, index)
    return index


class ShardSet:
    """All shards of one split, every slice of which is one read away.

    Holds the indices only, about 50 bytes a slice. Safe to fork, to pickle and to share between threads:
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
            self.volumes.extend(_entries(str(shard), index))
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
        return self._decoded(volume_id, z, "ct.blosc2")

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
        entry = self.volumes[volume_id]
        present = self._indices[entry.shard].slice_has_ts
        return self._planes(volume_id, z0, n, "ts.png", present, np.uint8) if entry.has_ts else None

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
        entry = self.volumes[volume_id]
        present = self._indices[entry.shard].slice_has_rex
        return self._planes(volume_id, z0, n, "rex.png", present, np.uint16) if entry.has_rex else None

    def _planes(
        self, volume_id: int, z0: int, n: int, field: str, present: np.ndarray, dtype: type[np.generic]
    ) -> np.ndarray:
        self._check_slices(volume_id, z0, n)
        planes = np.zeros((n, MASK_SIZE_PX, MASK_SIZE_PX), dtype)
        first = self.volumes[volume_id].first_sample + z0
        for i in np.flatnonzero(present[first : first + n]):
            planes[i] = self._decoded(volume_id, z0 + int(i), field)
        return planes

    def _decoded(self, volume_id: int, z: int, field: str) -> np.ndarray:
        self._check_slices(volume_id, z, 1)
        entry = self.volumes[volume_id]
        index = self._indices[entry.shard]
        row, column = entry.first_sample + z, FIELDS.index(field)
        shard = _opened(entry.shard, self._identities[entry.shard])
        data = os.pread(
            shard.descriptor, int(index.member_size[row, column]), int(index.member_offset[row, column])
        )
        try:
            return decode_ct(data) if field == "ct.blosc2" else decode_mask(data)
        except ValueError as error:
            raise ValueError(
                f"'{entry.shard}' is damaged at {field} of slice {z} of volume '{entry.volume}': {error} "
                "Delete the shard and run data_prep again."
            ) from error

    def _check_slices(self, volume_id: int, z0: int, n: int) -> None:
        entry = self.volumes[volume_id]
        if not (0 <= z0 < z0 + n <= entry.num_slices):
            raise ValueError(
                f"slices must lie in 0..{entry.num_slices - 1}, got {z0}..{z0 + n - 1} "
                f"for volume '{entry.volume}'."
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
    partial = [path.name for path in named if path.name.endswith(".partial")]
    if partial:
        logger.warning(
            "'%s' holds unfinished files %s: data_prep still runs or was interrupted.", folder, partial
        )
    return shards


def _entries(shard: str, index: ShardIndex) -> list[VolumeEntry]:
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
            if UNLABELLED in index.labels[i]
            else dict(zip(names, index.labels[i].tolist(), strict=True)),
        )
        for i in range(len(index.volume))
    ]


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
