"""MONAI transform that refuses a loaded volume which is no CT of known geometry, before it is resampled."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from common.transforms.orientation import voxel_axes


class CheckVolumed(MapTransform):
    """Check what a 3D encoder's input rests on: one channel, an affine that can be trusted, finite HU.

    Follows ``LoadImaged`` and ``EnsureChannelFirstd``, precedes ``Orientationd`` and ``Spacingd``, which take
    any affine for true. Writes the spacing of the stored volume in mm as ``spacing_mm`` (x, y, z).

    Args:
        keys: keys of CT volumes in HU that are MONAI meta tensors.

    Shape:
        ``(1, X, Y, Z)``, axes as stored; left as it is.

    Raises:
        ValueError: if an image carries no affine, has more than one channel, non-finite voxels or the same
            value everywhere, or as ``common.transforms.orientation.voxel_axes``.

    Example:
        >>> affine = torch.diag(torch.tensor([-0.5, -0.5, 2.0, 1.0]))
        >>> hu = torch.arange(30.0).reshape(1, 2, 3, 5)
        >>> CheckVolumed("image")({"image": MetaTensor(hu, affine=affine)})["spacing_mm"]
        (0.5, 0.5, 2.0)
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the sample with the volume's spacing."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            sample["spacing_mm"] = _spacing_mm(key, sample[key])
        return sample


def _spacing_mm(key: Hashable, image: torch.Tensor) -> tuple[float, float, float]:
    if not isinstance(image, MetaTensor):
        raise ValueError(
            f"'{key}' must be a meta tensor with an affine, got {type(image).__name__}. "
            "Load it with LoadImaged."
        )
    which = f" for {image.meta['filename_or_obj']}" if "filename_or_obj" in image.meta else ""
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"'{key}' must have shape (1, X, Y, Z), got {tuple(image.shape)}{which}.")
    low, high = (float(end) for end in image.as_tensor().aminmax())
    # the extremes of a tensor with NaN are NaN
    if not abs(low) + abs(high) < float("inf"):
        raise ValueError(f"'{key}' must have finite voxels, got NaN or infinity{which}.")
    if low == high:
        raise ValueError(f"'{key}' must show something, got {low:g} HU everywhere{which}.")
    try:
        return voxel_axes(image.affine.numpy(force=True))[2]
    except ValueError as error:
        rule, _, remedy = str(error).removesuffix(".").partition(". ")
        # without a cause: the first one is what the user sees, and it does not know the file
        raise ValueError(f"{rule}{which}.{remedy and f' {remedy}.'}") from None
