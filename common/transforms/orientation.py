"""Canonical axial slices: the one place where a volume's axes are sorted out.

Shapes: X Y Z voxel axes as stored, in any order and sign; Z H W canonical axes (slices, rows, columns).
World coordinates are nibabel's and MONAI's: x towards the patient's left is negative, y towards the back is
negative, z towards the head is positive (RAS+).
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from common.transforms.hounsfield import STORED_HU_RANGE

MAX_OBLIQUITY_DEG = 10.0
SLICE_AXES = ("yx", "xy")

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


class AxialSlicesd(MapTransform):
    """Turn loaded CT volumes into canonical axial slices, clipped to the HU that shards store.

    Follows ``LoadImaged`` and ``EnsureChannelFirstd``; writes the spacing in mm as ``spacing_mm`` (x, y, z).

    Args:
        keys: keys of CT volumes in HU that are MONAI meta tensors.
        slice_axes: ``yx`` shows rows anterior to posterior and columns right to left; ``xy`` transposes each
            slice, which is what the released DALE-CT weights were trained on.
        allow_missing_keys: pass over keys that a sample lacks.

    Shape:
        Input ``(1, X, Y, Z)``, axes as stored. Output ``(Z, 1, H, W)`` float32 HU on the CPU, a plain tensor;
        ``(Z, 1, W, H)`` for ``xy``.

    Raises:
        ValueError: if ``slice_axes`` is unknown, an image carries no affine, has more than one channel or
            non-finite voxels, two keys differ in spacing, or as ``axial_slices``.

    Example:
        >>> affine = torch.diag(torch.tensor([-0.5, -0.5, 2.0, 1.0]))
        >>> image = MetaTensor(torch.zeros(1, 2, 3, 5), affine=affine)
        >>> sample = AxialSlicesd("image")({"image": image})
        >>> sample["image"].shape, sample["spacing_mm"]
        (torch.Size([5, 1, 3, 2]), (0.5, 0.5, 2.0))
    """

    def __init__(
        self, keys: KeysCollection, slice_axes: str = "yx", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if slice_axes not in SLICE_AXES:
            raise ValueError(f"slice_axes must be one of {SLICE_AXES}, got '{slice_axes}'.")
        self.slice_axes = slice_axes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the sample with canonical slices in place of the volumes, and their spacing."""
        sample = dict(data)
        spacings: dict[Hashable, tuple[float, float, float]] = {}
        for key in self.key_iterator(sample):
            sample[key], spacings[key] = self._slices(key, sample[key])
        for spacing_mm in spacings.values():
            if not np.allclose(spacing_mm, next(iter(spacings.values())), rtol=1e-4):
                raise ValueError(f"keys must agree in spacing_mm, got {spacings}.")
            sample["spacing_mm"] = spacing_mm
        return sample

    def _slices(self, key: Hashable, image: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float, float]]:
        if not isinstance(image, MetaTensor):
            raise ValueError(
                f"'{key}' must be a meta tensor with an affine, got {type(image).__name__}. "
                "Load it with LoadImaged."
            )
        which = f" for {image.meta['filename_or_obj']}" if "filename_or_obj" in image.meta else ""
        if image.ndim != 4 or image.shape[0] != 1:
            raise ValueError(f"'{key}' must have shape (1, X, Y, Z), got {tuple(image.shape)}{which}.")
        stored = image.as_tensor()[0].numpy(force=True)
        if not np.isfinite(stored).all():
            raise ValueError(f"'{key}' must have finite voxels, got NaN or infinity{which}.")
        slices, spacing_mm = axial_slices(stored, image.affine.numpy(force=True))
        if self.slice_axes == "xy":
            slices = slices.transpose(0, 2, 1)
        hu = np.empty((slices.shape[0], 1, *slices.shape[1:]), dtype=np.float32)
        np.clip(slices, *STORED_HU_RANGE, out=hu[:, 0], casting="unsafe")
        return torch.from_numpy(hu), spacing_mm
