"""Several small shards become one, without decoding their slices.

Shapes: N volumes, C labels.
"""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.run.process import atomic_file
from common.shards.index import ABSENT, UNLABELLED, ShardIndex, save_index


def join_tars(tar: Path, parts: Sequence[Path], indices: Sequence[ShardIndex], plan: str) -> ShardIndex:
    """Write the shard that ``write_shard`` would have written of all volumes at once, byte for byte.

    Args:
        tar: tar to write; its index goes beside it.
        parts: shards whose volumes it takes, in order; at least one.
        indices: their indices.
        plan: fingerprint of the whole shard.

    Returns:
        The index.

    Raises:
        FileNotFoundError: if a part is incomplete.
        ValueError: if parts differ in the classes of their labels.
    """
    with atomic_file(tar) as file:
        for part, index in zip(parts, indices, strict=True):
            with part.open("rb") as body:
                _copy(body.fileno(), file.fileno(), _body_bytes(index))
        end = os.lseek(file.fileno(), 0, os.SEEK_CUR) + 2 * tarfile.BLOCKSIZE
        os.ftruncate(file.fileno(), -(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE)
    merged = merge_indices(indices, plan, tar.stat().st_size)
    save_index(tar, merged)
    return merged


def merge_indices(parts: Sequence[ShardIndex], plan: str, tar_bytes: int) -> ShardIndex:
    """Return the index of a tar that holds the bodies of several, one after the other.

    Args:
        parts: their indices, in order; at least one.
        plan: fingerprint of the whole shard.
        tar_bytes: size of the whole tar.

    Raises:
        ValueError: if parts differ in the classes of their labels.
    """
    label_names = next((part.label_names for part in parts if part.label_names.size), parts[0].label_names)
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ShardIndex._fields
        if np.ndim(getattr(parts[0], name)) and name not in ("member_offset", "label_names", "labels")
    }
    starts = np.cumsum([0, *(_body_bytes(part) for part in parts[:-1])])
    offsets = [
        np.where(part.member_offset == ABSENT, ABSENT, part.member_offset + start)
        for part, start in zip(parts, starts, strict=True)
    ]
    return parts[0]._replace(
        **joined,
        plan=np.array(plan),
        tar_bytes=np.int64(tar_bytes),
        member_offset=np.concatenate(offsets),
        label_names=label_names,
        labels=np.concatenate([_labels_by_name(part, label_names) for part in parts]),
    )


def _labels_by_name(part: ShardIndex, names: np.ndarray) -> np.ndarray:
    """Labels of a part's volume; one without labels does not know their names."""
    if not part.label_names.size:
        return np.full((len(part.volume), len(names)), UNLABELLED, np.int8)
    if not np.array_equal(part.label_names, names):
        raise ValueError(
            f"labels must name the same classes throughout a shard, got {part.label_names.tolist()} "
            f"for volume '{part.volume[0]}'."
        )
    return part.labels


def _body_bytes(index: ShardIndex) -> int:
    """Bytes of a tar before its end mark: where the next member would begin."""
    end = int((index.member_offset + index.member_size).max(initial=0))
    return -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _copy(source: int, target: int, num_bytes: int) -> None:
    """Copy the first bytes of a file inside the kernel."""
    done = 0
    while done < num_bytes:
        copied = os.sendfile(target, source, done, num_bytes - done)
        if not copied:
            raise FileNotFoundError("a part is shorter than its index says")
        done += copied
