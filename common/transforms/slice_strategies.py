"""The preprocessing strategies of Table VI: how a CT slice becomes the images that an encoder sees."""

# S slices, H side of a slice, K images a slice, I side of an image, D embedding

import re
from typing import Any

import torch
from monai.transforms import Transform
from torch.nn import functional as F

STRATEGIES = (
    *("raw_144", "raw_256", "raw_full", "cropped_144", "cropped_256", "cropped_full"),
    *("tiled_5cut", "tiled_5cut_items"),
)
"""Table VI in its order, and the tiles as items of the sequence. Sizes may be others: ``cropped_252``."""

FULL_PX = 512
"""Largest side of "full"; half of it, in whole patches, is the side of a tile. Source: FACTS 8."""

NUM_TILES = 5
NAME = re.compile(r"(?P<region>raw|cropped)_(?P<size>[1-9][0-9]{0,3}|full)|tiled_5cut(?P<items>_items)?")


class SliceStrategy(Transform):
    """Turn slices into images of the encoder, by the name of a row of Table VI.

    ``raw_<px>`` and ``cropped_<px>`` resize the whole slice or the body's square to ``px``; ``_full`` keeps
    its side, rounded down to whole patches, at most 512. ``tiled_5cut`` resizes the body's square to twice
    a tile (512 for patches of 16) and cuts the four quadrants and the centre; a slice's embedding is that of
    its five tiles one after another along the features, or with ``_items`` five tokens of the sequence.
    Every resize is antialiased (area-true) and in HU.

    Source: DALE-CT IV-F and Table VI. The paper's text concatenates tiles as features, its code as items; its
    code resizes whole slices without antialiasing, which confounds the crop with the filter.

    Args:
        name: as above.
        patch_size_px: side of the encoder's patch, of which sides are multiples.

    Attributes:
        name: as given.
        is_cropped: whether it wants the body box.
        num_images: K, images a slice.
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

    def region(self, hu: Any, box: tuple[int, int, int]) -> Any:  # noqa: ANN401 (array or tensor, as given)
        """Return the part of slices ``(S, H, H)`` that it shows, a view; the box is (top, left, side)."""
        top, left, side = box
        return hu[:, top : top + side, left : left + side] if self.is_cropped else hu

    def side_px(self, region_px: int) -> int:
        """Side of the images that are made of a region of this side.

        Args:
            region_px: side of the region.
        """
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
        """Join the embeddings of a volume's images to its tokens.

        Args:
            cls: ``(S * K, D)``.

        Returns:
            ``(S, K D)``, or ``(S * K, D)`` where tiles are items of the sequence.
        """
        return cls if self.as_items else cls.reshape(-1, self.num_images * cls.shape[-1])

    def z_mm(self, z_mm: torch.Tensor) -> torch.Tensor:
        """Give each token of ``tokens`` the position of its slice ``(S,)``."""
        return z_mm.repeat_interleave(self.num_images) if self.as_items else z_mm


def slice_strategies(names: list[str], patch_size_px: int, patch_tokens: bool = False) -> list[SliceStrategy]:
    """Build several strategies.

    Args:
        names: see :class:`SliceStrategy`.
        patch_size_px: side of the encoder's patch.
        patch_tokens: whether patch tokens are to be kept, too: of one image a slice, not of tiles.

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
