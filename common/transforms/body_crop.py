"""The square crop around the body that evaluation embeds."""

# S slices, H W pixels

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch.nn import functional as F

from common.ct.geometry import STORED_HU_RANGE

SLICES_PER_CHUNK = 32
"""Slices handled at a time, so that temporaries stay small; our choice, results do not depend on it."""

BITS = 8
"""Slices whose masks are eroded at once, a bit each: of a byte."""


def body_box(hu: torch.Tensor, threshold_hu: float = -500.0, opening_px: int = 25) -> tuple[int, int, int]:
    """Find the square around the body over all slices of a volume.

    The mask above the threshold is opened per slice with a square of ``opening_px``, which drops table and
    blanket; the bounding box of the union over slices is made square about its centre and shifted inside the
    image. No opened mask is made: dilation by half the square only moves the bounding box of the eroded mask,
    and the masks of eight slices are eroded at once, as the bits of a byte.

    Source: DALE-CT IV-A2 and its released preprocessing (threshold, opening). One box a volume, whatever the
    batch size, is our choice: the released code makes one per chunk of slices.

    Args:
        hu: CT in HU, square slices.
        threshold_hu: body is above it.
        opening_px: side of the square structuring element, odd. The image border does not erode.

    Shape:
        ``hu (S, H, H)`` or ``(S, 1, H, H)``. Output: (top, left, side) in pixels; the whole image if no body
        is left.

    Raises:
        ValueError: if the slices are not square, there is none, or ``opening_px`` is even or not positive.

    Example:
        >>> hu = torch.full((2, 64, 64), -1000)
        >>> hu[1, 10:50, 4:34] = 40
        >>> body_box(hu)
        (10, 0, 40)
    """
    if opening_px < 1 or opening_px % 2 == 0:
        raise ValueError(f"opening_px must be odd and positive, got {opening_px}.")
    hu = hu.squeeze(1) if hu.ndim == 4 else hu
    if hu.ndim != 3 or hu.shape[1] != hu.shape[2] or 0 in hu.shape:
        raise ValueError(
            f"hu must have shape (S, H, H) or (S, 1, H, H), got {tuple(hu.shape)}. Pad slices to squares."
        )
    size = hu.shape[-1]
    kept = torch.zeros(size, size, dtype=torch.uint8, device=hu.device)
    for slices in hu.split(BITS):
        body = torch.zeros_like(kept)
        for bit, plane in enumerate(slices):
            body.add_(plane > threshold_hu, alpha=1 << bit)
        kept |= _erode(_erode(body, opening_px, dim=0), opening_px, dim=1)
    if not kept.any():
        return 0, 0, size
    top, bottom = _extent(kept.any(1), opening_px // 2)
    left, right = _extent(kept.any(0), opening_px // 2)
    side = max(bottom - top, right - left)
    return _shifted_inside(top, bottom, side, size), _shifted_inside(left, right, side, size), side


def _erode(masks: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """Bits that are set in a whole centred window along one dimension; outside the image counts as body."""
    margin_shape = list(masks.shape)
    margin_shape[dim] = width // 2
    margin = masks.new_full(margin_shape, 2**BITS - 1)
    mask = torch.cat([margin, masks, margin], dim)
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        length = mask.shape[dim] - step
        mask = mask.narrow(dim, 0, length) & mask.narrow(dim, step, length)
        reach += step
    return mask


def _extent(occupied: torch.Tensor, grow: int) -> tuple[int, int]:
    """First and one past the last set position, grown on both sides within the image."""
    positions = occupied.nonzero()
    return max(int(positions[0]) - grow, 0), min(int(positions[-1]) + 1 + grow, len(occupied))


def _shifted_inside(start: int, stop: int, side: int, size: int) -> int:
    """Start of the stretch of length ``side`` about the middle of [start, stop), inside [0, size)."""
    return min(max((start + stop - side) // 2, 0), size - side)


class CropBodyd(MapTransform):
    """Crop every slice of a volume to its body box and resize, antialiased (area-true), to a square.

    Slices that are not square are first padded with air on both sides.

    Args:
        keys: keys of CT volumes in HU.
        size_px: side of the output.

    Shape:
        ``(S, 1, H, W)``. Output: float32 ``(S, 1, size_px, size_px)`` in HU.

    Raises:
        KeyError: if a key is missing.
        ValueError: if ``size_px`` is not positive or a volume has another shape.

    Example:
        >>> CropBodyd("image", size_px=16)({"image": torch.zeros(3, 1, 40, 30)})["image"].shape
        torch.Size([3, 1, 16, 16])
    """

    def __init__(self, keys: KeysCollection, size_px: int) -> None:
        super().__init__(keys)
        if size_px < 1:
            raise ValueError(f"size_px must be positive, got {size_px}.")
        self.size_px = size_px

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the keys cropped."""
        out = dict(data)
        for key in self.key_iterator(out):
            hu = out[key]
            out[key] = self._crop(hu.as_tensor() if isinstance(hu, MetaTensor) else torch.as_tensor(hu), key)
        return out

    def _crop(self, hu: torch.Tensor, key: Hashable) -> torch.Tensor:
        if hu.ndim != 4 or hu.shape[1] != 1:
            raise ValueError(f"{key} must have shape (S, 1, H, W), got {tuple(hu.shape)}.")
        hu = _padded_to_square(hu)
        top, left, side = body_box(hu)
        crop = hu[..., top : top + side, left : left + side]
        size = (self.size_px, self.size_px)
        resized = [
            F.interpolate(slices.float(), size, mode="bilinear", align_corners=False, antialias=True)
            for slices in crop.split(SLICES_PER_CHUNK)
        ]
        return torch.cat(resized)


def _padded_to_square(hu: torch.Tensor) -> torch.Tensor:
    height, width = hu.shape[-2:]
    if height == width:
        return hu
    top, left = max(width - height, 0) // 2, max(height - width, 0) // 2
    bottom, right = max(width - height, 0) - top, max(height - width, 0) - left
    return F.pad(hu, (left, right, top, bottom), value=STORED_HU_RANGE[0])
