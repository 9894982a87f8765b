"""TotalSegmentator label maps on the shards' 128 x 128 grid.

Shapes: Z slices, H rows, W columns of the CT.
"""

from pathlib import Path

import numpy as np

from common.data.shard_volume import MASK_SIZE_PX, NUM_TS_CLASSES
from data_prep.nifti_file import canonical_slices, read_stored
from data_prep.rejection import RejectedError

SPACING_TOLERANCE = 0.05
"""How far a mask's spacing may be from its CT's. Our choice: headers round, another scan differs by more."""


def read_label_map(path: Path, shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Read a label map of task ``total`` and reduce each slice to 128 x 128, nearest voxel.

    The map goes through its own affine, so it may be stored in another order than its CT.

    Args:
        path: NIfTI file of ids 0 to 117.
        shape: (Z, H, W) of the CT's canonical slices.
        spacing_mm: of the CT as (x, y, z).

    Returns:
        uint8 ``(Z, 128, 128)``.

    Raises:
        RejectedError: if the file is damaged, its header blank, or its shape, spacing or ids do not fit.
    """
    stored, header = read_stored(path)
    if header.is_blank:
        raise RejectedError("mask", f"'{path.name}' must state its orientation, got a blank header")
    if (header.slope, header.intercept) != (1, 0):
        stored = stored * header.slope + header.intercept
    if not np.isfinite(low := float(stored.min())) or low < 0 or stored.max() >= NUM_TS_CLASSES:
        raise RejectedError(
            "mask",
            f"ids of '{path.name}' must lie in 0..{NUM_TS_CLASSES - 1}, got {low:g} to {stored.max():g}",
        )
    if stored.dtype.kind == "f" and (stored % 1).any():
        raise RejectedError("mask", f"ids of '{path.name}' must be whole numbers, got fractions")
    ids, mask_spacing_mm = canonical_slices(stored, header.affine)
    if ids.shape != tuple(shape):
        raise RejectedError("mask", f"'{path.name}' must have the CT's shape {tuple(shape)}, got {ids.shape}")
    if not np.allclose(mask_spacing_mm, spacing_mm, rtol=SPACING_TOLERANCE):
        raise RejectedError(
            "mask", f"'{path.name}' must have the CT's spacing {spacing_mm} mm, got {mask_spacing_mm}"
        )
    return nearest(ids).astype(np.uint8)


def nearest(ids: np.ndarray) -> np.ndarray:
    """Sample each slice at the centres of a 128 x 128 grid.

    Shape:
        Input ``(Z, H, W)``. Output ``(Z, 128, 128)``.

    Example:
        >>> nearest(np.arange(512).reshape(1, 1, 512))[0, 0, :3]
        array([ 2,  6, 10])
    """
    rows, columns = (
        ((np.arange(MASK_SIZE_PX) + 0.5) * size / MASK_SIZE_PX).astype(np.intp) for size in ids.shape[1:]
    )
    return ids[:, rows[:, None], columns]
