"""TotalSegmentator label maps on the shards' 128 x 128 grid.

Shapes: Z slices, H rows, W columns of the CT.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.ct.files import open_volume
from common.ct.geometry import Grid
from common.ct.nifti import VolumeFile, VolumeHeader
from common.ct.rejection import RejectedError
from common.shards.codec import MASK_SIZE_PX, NUM_TS_CLASSES
from data_prep.sources.mask_alignment import Alignment, align, cell_voxels


def read_label_map(path: Path, ct: Grid) -> np.ndarray:
    """Read a label map of task ``total`` and reduce each slice to 128 x 128: the id at each cell's centre.

    Its own affine says where it lies, so it may be stored in another order than its CT, or on another grid
    over the same space; ids are never interpolated.

    Args:
        path: file of ids 0 to 117, see ``open_volume``.
        ct: grid of the CT.

    Returns:
        uint8 ``(Z, 128, 128)``.

    Raises:
        RejectedError: if the file is damaged, its header is blank, it does not cover the CT, or an id is
            unknown.
    """
    with open_volume(path) as file:
        alignment = _alignment(path.name, file.header, ct)
        sample = _sample if alignment.is_same_grid else _resample
        return sample(path.name, file, alignment)


def read_full_label_map(path: Path, ct: Grid) -> np.ndarray:
    """Read a label map of task ``total`` on the voxels of its CT, all of them.

    Args:
        path: file of ids 0 to 117, see ``open_volume``.
        ct: grid of the CT.

    Returns:
        uint8 ``(Z, H, W)``.

    Raises:
        RejectedError: as ``read_label_map``, and if the map is on another grid than the CT.
    """
    with open_volume(path) as file:
        alignment = _alignment(path.name, file.header, ct)
        return alignment.on_ct_grid(path.name, _whole(path.name, file, alignment))


def _alignment(name: str, header: VolumeHeader, ct: Grid) -> Alignment:
    if header.is_blank:
        raise RejectedError("mask", f"'{name}' must state its orientation, got a blank header")
    if header.contradiction:
        raise RejectedError("mask", f"'{name}' must state one geometry, got {header.contradiction}")
    if len(header.shape) != 3:
        raise RejectedError("mask", f"'{name}' must have 3 axes, got shape {header.shape}")
    return align(name, header.shape, header.affine, ct)


def _sample(name: str, file: VolumeFile, alignment: Alignment) -> np.ndarray:
    """Take the voxels at the centres of cells as the planes arrive."""
    taken = [alignment.index_along(0), alignment.index_along(1), alignment.index_along(2)]
    taken[1:] = (indices[cell_voxels(len(indices))] for indices in taken[1:])
    axes = alignment.axis_of
    i, j, k = (taken[axes.index(axis)] for axis in range(3))
    sampled = np.empty((len(i), len(j), len(k)), np.uint8)
    for first, ids in _ids(name, file):
        here = np.flatnonzero((k >= first) & (k < first + ids.shape[-1]))
        sampled[..., here] = ids[np.ix_(i, j, k[here] - first)]
    return np.ascontiguousarray(sampled.transpose(axes))


def _resample(name: str, file: VolumeFile, alignment: Alignment) -> np.ndarray:
    """Take the voxels nearest to the centres of cells, which may lie in any plane of the map."""
    whole = _whole(name, file, alignment)
    sampled = np.empty((alignment.ct_shape[0], MASK_SIZE_PX, MASK_SIZE_PX), np.uint8)
    for z in range(len(sampled)):
        sampled[z] = whole[alignment.nearest(z)]
    return sampled


def _whole(name: str, file: VolumeFile, alignment: Alignment) -> np.ndarray:
    whole = np.empty(alignment.mask_shape, np.uint8, order="F")
    for first, ids in _ids(name, file):
        whole[..., first : first + ids.shape[-1]] = ids
    return whole


def _ids(name: str, file: VolumeFile) -> Iterator[tuple[int, np.ndarray]]:
    """Read planes, and check that they are ids."""
    for first, ids in file.labels():
        low, high = float(ids.min()), float(ids.max())
        if not (low >= 0 and high < NUM_TS_CLASSES):
            raise RejectedError(
                "mask", f"ids of '{name}' must lie in 0..{NUM_TS_CLASSES - 1}, got {low:g} to {high:g}"
            )
        yield first, ids
