"""The preprocessing strategies of Table VI: how a CT slice becomes the images that an encoder sees."""

# S slices, H side of a slice, K images per slice, I side of an image, D embedding

import re

import numpy as np
import torch
from torch.nn import functional as F

STRATEGIES = (
    *("raw_144", "raw_256", "raw_full", "cropped_144", "cropped_256", "cropped_full"),
    *("tiled_5cut", "tiled_5cut_items"),
)
"""Table VI in its order, and the tiles as items of the sequence. Other sizes work too: ``cropped_252``."""

FULL_PX = 512
"""Largest side of "full"; half of it, in whole patches, is the side of a tile. Source: DALE-CT, Table VI."""

NUM_TILES = 5
NAME = re.compile(r"(?P<region>raw|cropped)_(?P<size>[1-9][0-9]{0,3}|full)|tiled_5cut(?P<items>_items)?")


class SliceStrategy:
    """Turn slices into images of the encoder, by the name of a row of Table VI.

    ``raw_<px>`` and ``cropped_<px>`` resize the whole slice or the body's square to ``px``; ``_full`` keeps
    its side, rounded down to whole patches, at most 512. ``tiled_5cut`` resizes the body's square to twice
    a tile (512 for patches of 16) and cuts the four quadrants and the centre; the embeddings of the five
    tiles are joined along the features, or with ``_items`` are five tokens of the sequence.
    Every resize is antialiased (area-true) and in HU.

    Source: DALE-CT IV-F and Table VI. The paper's text concatenates tiles as features, its code as items; its
    code resizes whole slices without antialiasing, which confounds the crop with the filter.

    Args:
        name: name of the strategy, as above.
        patch_size_px: side of the encoder's patch, of which sides are multiples.

    Attributes:
        is_cropped: whether it needs the body box.
        num_images: K, images per slice.
        is_fixed: whether images have the same side for all volumes.

    Shape:
        Input: slices ``(S, H, H)`` in HU, any real type; the region of :meth:`region`.
        Output: float32 ``(S * K, 1, I, I)`` in HU, the images of a slice one after another.

    Raises:
        ValueError: if the name is unknown or its side no multiple of the patch.

    Example:
        >>> SliceStrategy("cropped_252", 14)(torch.zeros(3, 40, 40)).shape
        torch.Size([3, 1, 252, 252])
        >>> SliceStrategy("tiled_5cut", 16)(torch.zeros(3, 40, 40)).shape
        torch.Size([15, 1, 256, 256])
    """

    def __init__(self, name: str, patch_size_px: int) -> None:
        found = NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"strategy must be one of {STRATEGIES}, or raw_<px> or cropped_<px>, got '{name}'."
            )
        self.name = name
        self.patch_size_px = patch_size_px
        self.is_tiled = found["region"] is None
        self.is_cropped = found["region"] != "raw"
        self.as_items = found["items"] is not None
        self.num_images = NUM_TILES if self.is_tiled else 1
        self.is_fixed = found["size"] != "full"
        self.size_px = int(found["size"]) if found["size"] not in (None, "full") else None
        if self.size_px is not None and self.size_px % patch_size_px:
            whole = max(self.size_px // patch_size_px, 1) * patch_size_px
            raise ValueError(
                f"strategy must have a multiple of the patch's {patch_size_px} px, got '{name}'. "
                f"Use {found['region']}_{whole}."
            )

    def region(self, hu: torch.Tensor, box: tuple[int, int, int] | None) -> torch.Tensor:
        """Return the part of slices ``(S, H, H)`` that it shows, a view; the box is (top, left, side)."""
        if not self.is_cropped or box is None:
            return hu
        top, left, side = box
        return hu[:, top : top + side, left : left + side]

    def side_px(self, region_px: int) -> int:
        """Side of the images that are made of a region of this side."""
        if self.is_tiled:
            return FULL_PX // 2 // self.patch_size_px * self.patch_size_px
        if self.size_px is not None:
            return self.size_px
        patches = min(region_px, FULL_PX) // self.patch_size_px
        return max(patches, 1) * self.patch_size_px

    def __call__(self, region: torch.Tensor) -> torch.Tensor:
        """Make images; see the class."""
        side = self.side_px(region.shape[-1])
        if not self.is_tiled:
            return _resized(region, side)
        square = _resized(region, 2 * side)
        corners = ((0, 0), (0, side), (side, 0), (side, side), (side // 2, side // 2))
        tiles = [square[..., row : row + side, column : column + side] for row, column in corners]
        return torch.stack(tiles, dim=1).flatten(0, 1)

    def tokens(self, cls: torch.Tensor) -> torch.Tensor:
        """Join embeddings of images ``(S * K, D)`` to tokens ``(S, K D)``, or ``(S * K, D)`` of items."""
        return cls if self.as_items else cls.reshape(-1, self.num_images * cls.shape[-1])

    def z_mm(self, z_mm: torch.Tensor) -> torch.Tensor:
        """Give each token of ``tokens`` the position of its slice ``(S,)``."""
        return z_mm.repeat_interleave(self.num_images) if self.as_items else z_mm


def slice_strategies(names: list[str], patch_size_px: int, patch_tokens: bool = False) -> list[SliceStrategy]:
    """Build the strategies of a run.

    Args:
        names: names of :class:`SliceStrategy`.
        patch_size_px: side of the encoder's patch.
        patch_tokens: whether patch tokens are also kept: of one image per slice, not of tiles.

    Raises:
        ValueError: if there is none, one is unknown or named twice, or tiles are to keep patch tokens.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise ValueError(f"strategies must be a list of names, each once, got {names!r}.")
    strategies = [SliceStrategy(name, patch_size_px) for name in names]
    tiled = [strategy.name for strategy in strategies if strategy.is_tiled]
    if patch_tokens and tiled:
        raise ValueError(f"patch_tokens must be False for tiles, got True for '{tiled[0]}'.")
    return strategies


def _resized(region: torch.Tensor, side: int) -> torch.Tensor:
    images = region.float().unsqueeze(1)
    if region.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def pad_to_square(slices: np.ndarray, fill: int) -> np.ndarray:
    """Pad slices ``(S, H, W)`` to squares, evenly on both sides, in one contiguous block of memory.

    Example:
        >>> pad_to_square(np.zeros((1, 1, 3), np.int16), -1024).tolist()
        [[[-1024, -1024, -1024], [0, 0, 0], [-1024, -1024, -1024]]]
    """
    height, width = slices.shape[1:]
    if height == width:
        return np.ascontiguousarray(slices)
    rows, columns = max(width - height, 0), max(height - width, 0)
    margins = ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
    return np.pad(slices, margins, constant_values=fill)


BODY_HU = -500  # what the body exceeds
OPENING_PX = 25  # side of the square that a body must hold, odd
BITS = 8  # slices whose masks are eroded at once: the bits of a byte


def body_box(hu: torch.Tensor) -> tuple[int, int, int]:
    """Find the square around the body over all slices of a volume.

    The mask above ``BODY_HU`` is opened per slice with a square of ``OPENING_PX``, which drops table and
    blanket; the image border does not erode; the bounding box of the union over slices is made square about
    its centre and shifted inside the image. No opened mask is made: dilation by half the square only moves
    the bounding box of the eroded mask, and the masks of eight slices are eroded at once, as the bits of a
    byte.

    Source: DALE-CT IV-A2 and its released preprocessing (threshold, opening). One box per volume, whatever
    the batch size, is our choice: the released code makes one per chunk of slices.

    Args:
        hu: CT in HU, square slices ``(S, H, H)``.

    Returns:
        (top, left, side) in pixels; the whole image if no body is left.

    Raises:
        ValueError: if the slices are not square, or there is none.

    Example:
        >>> hu = torch.full((2, 64, 64), -1000)
        >>> hu[1, 10:50, 4:34] = 40
        >>> body_box(hu)
        (10, 0, 40)
    """
    if hu.ndim != 3 or hu.shape[1] != hu.shape[2] or 0 in hu.shape:
        raise ValueError(f"hu must have shape (S, H, H), got {tuple(hu.shape)}. Pad slices to squares.")
    size = hu.shape[-1]
    kept = torch.zeros(size, size, dtype=torch.uint8, device=hu.device)
    for slices in hu.split(BITS):
        body = torch.zeros_like(kept)
        for bit, plane in enumerate(slices):
            body.add_(plane > BODY_HU, alpha=1 << bit)
        kept |= _erode(_erode(body, OPENING_PX, dim=0), OPENING_PX, dim=1)
    if not kept.any():
        return 0, 0, size
    top, bottom = _extent(kept.any(1), OPENING_PX // 2)
    left, right = _extent(kept.any(0), OPENING_PX // 2)
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
