"""MONAI transform from a loaded CT volume to canonical axial slices.

Shapes: X Y Z voxel axes as stored, in any order and sign; Z H W canonical axes (slices, rows, columns).
"""

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from common.data.slice_codec import STORED_HU_RANGE
from common.transforms.orientation import axial_slices

SLICE_AXES = ("yx", "xy")


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
