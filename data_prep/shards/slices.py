"""Slices of one shard, read by a task that needs no other index.

A ``ShardSet`` holds the indices of a whole cohort, about a gigabyte for CT-RATE: too much for every worker.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.shards.codec import decode_ct, decode_mask
from common.shards.index import FIELDS, ShardIndex


def read_slices(shard: Path, index: ShardIndex, field: str, samples: Iterable[int]) -> Iterator[np.ndarray]:
    """Read one member of each of some samples.

    Args:
        shard: path of the tar.
        index: index of the shard.
        field: image among ``FIELDS``, such as ``ct.blosc2``; every sample must have it.
        samples: positions in the shard.

    Yields:
        ``(H, W)``: int16 HU, or a mask as it was stored.

    Raises:
        ValueError: if the shard is damaged there.
    """
    decode = decode_ct if field == "ct.blosc2" else decode_mask
    column = FIELDS.index(field)
    with shard.open("rb") as file:
        for sample in samples:
            offset, size = int(index.member_offset[sample, column]), int(index.member_size[sample, column])
            try:
                yield decode(os.pread(file.fileno(), size, offset))
            except ValueError as error:
                raise ValueError(
                    f"'{shard}' is damaged at {field} of sample {sample}: {error} "
                    "Delete the shard and run data_prep again."
                ) from error
