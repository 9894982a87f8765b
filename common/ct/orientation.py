"""Canonical axial slices: the one place where a volume's axes are sorted out.

Shapes: X Y Z voxel axes as stored, in any order and sign; Z H W canonical axes (slices, rows, columns).
World coordinates are nibabel's and MONAI's: x towards the patient's left is negative, y towards the back is
negative, z towards the head is positive (RAS+).
"""

import numpy as np

MAX_OBLIQUITY_DEG = 10.0

# Signs of the world axes x, y, z along which canonical indices grow: to the left, to the back, to the head.
_LPS_SIGNS = (-1, -1, 1)


def axial_slices(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Show a stored volume as axial slices, feet to head, the radiological way.

    Rows run from anterior to posterior, columns from the patient's right to the left. The affine alone
    decides, so one scan stored as RAS, LPS, LAS or (Z, Y, X) gives the same slices. CT and masks go through
    alike. Voxels are permuted and flipped, never resampled: the angle of an oblique scan stays in it.

    Args:
        volume: any dtype, axes as stored.
        affine: voxel to RAS+ world coordinates in mm.

    Shape:
        Input ``(X, Y, Z)`` and ``(4, 4)``. Output ``(Z, H, W)``, a view of ``volume``.

    Returns:
        The slices and their spacing in mm as (x, y, z): columns, rows, slices.

    Raises:
        ValueError: if the volume is not 3-D, or the affine is not a finite 4 x 4 matrix of perpendicular
            axes, or turned by more than 10 degrees from the world axes (our choice: a scan tilted by more is
            no longer axial).

    Example:
        >>> stored = np.arange(2 * 3 * 5).reshape(2, 3, 5)
        >>> slices, spacing_mm = axial_slices(stored, np.diag([-0.7, -0.8, 1.5, 1.0]))
        >>> slices.shape, spacing_mm
        ((5, 3, 2), (0.7, 0.8, 1.5))
        >>> bool((slices == stored.transpose(2, 1, 0)).all())
        True
    """
    if volume.ndim != 3:
        raise ValueError(f"volume must have 3 axes, got shape {volume.shape}.")
    axis_of_world, sign_of_world, spacing_mm = voxel_axes(affine)
    slices = volume.transpose([axis_of_world[world] for world in (2, 1, 0)])
    flips = [sign_of_world[world] != _LPS_SIGNS[world] for world in (2, 1, 0)]
    return slices[tuple(slice(None, None, -1 if flip else 1) for flip in flips)], spacing_mm


def voxel_axes(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float]]:
    """Find the voxel axis that runs along each world axis.

    Args:
        affine: ``(4, 4)`` voxel to RAS+ world coordinates in mm.

    Returns:
        For the world axes x, y, z: the voxel axis, the sign of its direction, and its spacing in mm.

    Raises:
        ValueError: as ``axial_slices``.

    Example:
        >>> voxel_axes(np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0, 1]]))
        ((2, 1, 0), (-1, -1, -1), (0.8, 0.8, 2.5))
    """
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"affine must be a finite 4 x 4 matrix, got {np.round(matrix, 3).tolist()}.")
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    cosines = matrix[:3, :3] / np.where(spacing, spacing, 1)
    # 1 for perpendicular axes, 0 for axes in a plane; two that share their closest world axis stay below 1/2.
    if abs(np.linalg.det(cosines)) < 0.5:
        raise ValueError(f"affine must have three perpendicular axes, got {np.round(matrix, 3).tolist()}.")
    closest = np.abs(cosines).argmax(axis=0)
    turned_deg = float(np.degrees(np.arccos(np.abs(cosines).max(axis=0).clip(max=1))).max())
    if turned_deg > MAX_OBLIQUITY_DEG:
        raise ValueError(
            f"affine must be within {MAX_OBLIQUITY_DEG:g} degrees of the world axes, got {turned_deg:.1f}. "
            "Resample the volume to axial slices first."
        )
    axes = tuple(int(axis) for axis in np.argsort(closest))
    signs = tuple(int(np.sign(cosines[world, axis])) for world, axis in enumerate(axes))
    x, y, z = (float(spacing[axis]) for axis in axes)
    return axes, signs, (x, y, z)
