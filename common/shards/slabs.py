"""Slabs: runs of consecutive slices that span a fixed physical thickness."""

import math

import numpy as np

HEADER_TOLERANCE = 1e-6
"""Headers store spacings as float32: 4.8 mm reads 4.80000019 and must count as 4.8. Our choice, relative."""


def slab_num_slices(spacing_z_mm: float, slab_mm: float, volume: str = "") -> int:
    """Count the slices that span a slab: thickness over spacing, rounded half up, at least one.

    Source: DALE-CT III-A, 12 mm. Rounding half up is our choice (the released code rounds half to even).

    Args:
        spacing_z_mm: distance of neighbouring slices in mm.
        slab_mm: thickness of the slab in mm; 0 for slabs of one slice, the pure 2D ablation of Table V.
        volume: named in the error.

    Raises:
        ValueError: if the thickness is negative or not finite, or the spacing not positive and finite.

    Example:
        >>> [slab_num_slices(spacing, 12.0) for spacing in (0.5, 1.0, 1.5, 4.8, 5.0, 30.0)]
        [24, 12, 8, 3, 2, 1]
    """
    if not (math.isfinite(slab_mm) and slab_mm >= 0):
        raise ValueError(f"slab_mm must be positive, or 0 for single slices, got {slab_mm}.")
    if not (math.isfinite(spacing_z_mm) and spacing_z_mm > 0):
        of = f" for volume '{volume}'" if volume else ""
        raise ValueError(
            f"spacing_mm must be positive to cut {slab_mm} mm slabs, got {spacing_z_mm}{of}. "
            "Prepare the shards again without it."
        )
    return max(1, math.floor(slab_mm / spacing_z_mm * (1 + HEADER_TOLERANCE) + 0.5))


def slab_starts(num_slices: int, length: int) -> np.ndarray:
    """Tile a volume with slabs from its first slice; return the first slice of each.

    A remainder becomes a slab that ends at the last slice and overlaps its neighbour, so that every slab of a
    volume has the full length. A volume shorter than a slab is one slab.

    Source: tiling from DALE-CT III-A; the full-length last slab is our choice (the released code keeps a
    short one).

    Args:
        num_slices: slices of the volume.
        length: slices of a slab.

    Raises:
        ValueError: if one of the two is not positive.

    Example:
        >>> slab_starts(29, 12)
        array([ 0, 12, 17])
    """
    if num_slices < 1 or length < 1:
        raise ValueError(f"num_slices and length must be positive, got {num_slices} and {length}.")
    starts = np.arange(0, num_slices, length)
    return np.minimum(starts, max(num_slices - length, 0))
