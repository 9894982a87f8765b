"""How a mask lies on its CT: voxel on voxel, over the same space on another grid, or elsewhere.

Shapes: Z H W canonical slices, rows, columns of the CT; three axes of the mask as stored.
"""

from itertools import product
from typing import NamedTuple

import numpy as np

from common.ct.geometry import (
    SPACING_TOLERANCE,
    Grid,
    canonical_axes,
    canonical_indices,
    canonical_shape,
    shown_mm,
)
from common.ct.rejection import RejectedError
from common.shards.codec import MASK_SIZE_PX

HALF_VOXEL = 0.5

CORNERS = np.array([*product((0, 1), repeat=3)])


class Alignment(NamedTuple):
    """Where the voxels of a CT lie in a mask.

    Args:
        ct_shape: ``(Z, H, W)``.
        mask_shape: shape of the mask as stored.
        to_mask: ``(4, 4)`` canonical CT index (slice, row, column) to mask index.
        is_same_grid: whether every voxel of one is a voxel of the other: ``to_mask`` then permutes and flips.
    """

    ct_shape: tuple[int, int, int]
    mask_shape: tuple[int, int, int]
    to_mask: np.ndarray
    is_same_grid: bool

    @property
    def axis_of(self) -> tuple[int, ...]:
        """Mask axis along slices, rows and columns, for a mask on the CT's grid."""
        return tuple(int(axis) for axis in np.abs(self.to_mask[:3, :3]).argmax(axis=0))

    def index_along(self, canonical: int) -> np.ndarray:
        """Return for each slice (0), row (1) or column (2) its index in a mask on the CT's grid."""
        axis = self.axis_of[canonical]
        indices = np.arange(self.ct_shape[canonical])
        return indices if self.to_mask[axis, canonical] > 0 else indices[::-1]

    def on_ct_grid(self, name: str, mask: np.ndarray) -> np.ndarray:
        """Show a mask as the CT's slices ``(Z, H, W)``, a view: permuted and flipped, never resampled.

        Args:
            name: name of the mask's file, for errors.
            mask: mask as stored.

        Raises:
            RejectedError: if its voxels are not those of the CT.
        """
        if not self.is_same_grid:
            raise RejectedError(
                "mask", f"'{name}' must lie on the voxels of the CT for dense labels, but is on another grid"
            )
        i, j, k = (slice(None, None, 1 if step > 0 else -1) for step in self.to_mask[:3, :3].sum(axis=1))
        return mask[i, j, k].transpose(self.axis_of)

    def nearest(self, z: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the mask indices nearest to the 128 x 128 cells of a slice, one array per axis."""
        rows, columns = (cell_voxels(size) for size in self.ct_shape[1:])
        cells = np.stack(np.broadcast_arrays(float(z), rows[:, None], columns))
        place = np.tensordot(self.to_mask[:3, :3], cells, 1) + self.to_mask[:3, 3, None, None]
        # Space that the mask misses by less than the tolerance takes the mask's outermost voxels.
        last = np.array(self.mask_shape)[:, None, None] - 1
        i, j, k = np.floor(place + HALF_VOXEL).astype(np.intp).clip(0, last)
        return i, j, k


def cell_voxels(size: int) -> np.ndarray:
    """Return the pixel at the centre of each of 128 cells along an axis of ``size`` pixels.

    Example:
        >>> cell_voxels(512)[:3]
        array([ 2,  6, 10])
    """
    return ((np.arange(MASK_SIZE_PX) + 0.5) * size / MASK_SIZE_PX).astype(np.intp)


def align(name: str, mask_shape: tuple[int, ...], mask_affine: np.ndarray, ct: Grid) -> Alignment:
    """Find how a mask lies on its CT.

    They are on the same grid, in any order of axes and with any flips, if no voxel is off by half a voxel:
    resampling to the nearest voxel would change nothing. Otherwise the mask must cover the CT. Resampled
    masks have a rounded number of voxels, so each edge may miss by one voxel of the coarser grid.

    Args:
        name: name of the mask's file, for errors.
        mask_shape: shape of the mask as stored, three axes.
        mask_affine: ``(4, 4)`` mask voxel to RAS+ world in mm.
        ct: grid of the CT.

    Raises:
        RejectedError: if the mask does not cover the CT, has its voxels but another number of them, or their
            number but lies on others: then its geometry was lost.
    """
    i, j, k = mask_shape
    ct_shape = canonical_shape(ct)
    if not np.isfinite(mask_affine).all() or abs(np.linalg.det(mask_affine[:3, :3])) < 1e-6:
        raise RejectedError(
            "mask", f"'{name}' must state its orientation, got the affine {np.round(mask_affine, 3).tolist()}"
        )
    mask = Grid((i, j, k), mask_affine)
    if not ct.has_origin:
        return _without_origin(name, mask, ct)
    to_mask = np.linalg.inv(mask_affine) @ ct.affine @ canonical_indices(ct)
    corners = _apply(to_mask, CORNERS * (np.array(ct_shape) - 1))
    for from_far_end in (False, True):
        exact = _permutation(to_mask, ct_shape, mask.shape, from_far_end)
        off = np.abs(corners - _apply(exact, CORNERS * (np.array(ct_shape) - 1))).max()
        if off < HALF_VOXEL:
            _check_shape(name, mask.shape, exact, ct_shape)
            return Alignment(ct_shape, mask.shape, exact, is_same_grid=True)
    edges = _apply(to_mask, CORNERS * np.array(ct_shape) - HALF_VOXEL)
    missed = np.maximum(-HALF_VOXEL - edges, edges - (np.array(mask.shape) - HALF_VOXEL)).max(axis=0)
    if (missed > np.abs(to_mask[:3, :3]).max(axis=1).clip(min=1)).any():
        raise RejectedError("mask", f"'{name}' must cover the CT, {_extent(ct)}, got {_extent(mask)}")
    if _shape_seen(mask.shape, exact) == ct_shape:
        of_ct, of_mask = (shown_mm(np.linalg.norm(grid.affine[:3, :3], axis=0)) for grid in (ct, mask))
        raise RejectedError(
            "mask",
            f"'{name}' has the CT's shape {ct_shape}, but lies on other voxels: spacing {of_ct} mm in the "
            f"CT, {of_mask} mm in the mask. Save the mask with the geometry of its CT.",
        )
    return Alignment(ct_shape, mask.shape, to_mask, is_same_grid=False)


def _without_origin(name: str, mask: Grid, ct: Grid) -> Alignment:
    """Align a mask by orientation, shape and spacing alone."""
    _, _, spacing_mm = canonical_axes(ct.affine)
    _, _, mask_spacing_mm = canonical_axes(mask.affine)
    exact = canonical_indices(mask)
    _check_shape(name, mask.shape, exact, canonical_shape(ct))
    if not np.allclose(mask_spacing_mm, spacing_mm, rtol=SPACING_TOLERANCE):
        raise RejectedError(
            "mask", f"'{name}' must have the CT's spacing {spacing_mm} mm, got {mask_spacing_mm}"
        )
    return Alignment(canonical_shape(ct), mask.shape, exact, is_same_grid=True)


def _check_shape(
    name: str, mask_shape: tuple[int, ...], exact: np.ndarray, ct_shape: tuple[int, ...]
) -> None:
    shape = _shape_seen(mask_shape, exact)
    if shape != tuple(ct_shape):
        raise RejectedError("mask", f"'{name}' must have the CT's shape {tuple(ct_shape)}, got {shape}")


def _shape_seen(mask_shape: tuple[int, ...], exact: np.ndarray) -> tuple[int, ...]:
    """Return the shape of a mask along the slices, rows and columns of its CT."""
    return tuple(mask_shape[axis] for axis in np.abs(exact[:3, :3]).argmax(axis=0))


def _permutation(
    to_mask: np.ndarray, ct_shape: tuple[int, ...], mask_shape: tuple[int, ...], from_far_end: bool
) -> np.ndarray:
    """Return the closest matrix that permutes and flips, with the first or last voxels of both aligned."""
    exact = np.eye(4)
    exact[:3, :3] = 0
    for canonical in range(3):
        axis = int(np.abs(to_mask[:3, canonical]).argmax())
        sign = 1 if to_mask[axis, canonical] > 0 else -1
        exact[axis, canonical] = sign
        excess = mask_shape[axis] - ct_shape[canonical] if from_far_end else 0
        exact[axis, 3] = excess if sign > 0 else mask_shape[axis] - 1 - excess
    return exact


def _apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    moved: np.ndarray = points @ matrix[:3, :3].T + matrix[:3, 3]
    return moved


def _extent(grid: Grid) -> str:
    """Describe the space of a grid in the world."""
    ends = _apply(grid.affine, CORNERS * np.array(grid.shape) - HALF_VOXEL)
    sides = zip("xyz", ends.min(axis=0), ends.max(axis=0), strict=True)
    return ", ".join(f"{axis} {low:.1f}..{high:.1f}" for axis, low, high in sides) + " mm"
