"""The coarse grid of a slab's masks: its positive positions, and the cells that a view's pixels fall in."""

# S slices, M side of the mask grid

from collections.abc import Mapping
from functools import lru_cache

import numpy as np


class MaskPositions:
    """Positive cells of a slab's masks, searched for once per mask and slice.

    Args:
        masks: mask of each kind, positive where not 0, or None where a volume has none.

    Shape:
        Each mask ``(S, M, M)``.

    Example:
        >>> mask = np.zeros((3, 4, 4), np.uint8)
        >>> mask[2, 1, 3] = 7
        >>> positions = MaskPositions({1: mask, 2: None})
        >>> positions.count(1, None), positions.count(1, 0), positions.count(2, None)
        (1, 0, 0)
        >>> positions.pick(1, None, rank=0.5, within=np.array([0.5, 0.0]))
        (2, array([0.375, 0.75 ]))
    """

    def __init__(self, masks: Mapping[int, np.ndarray | None]) -> None:
        self.masks = masks
        self._cells: dict[tuple[int, int | None], np.ndarray] = {}

    def count(self, kind: int, z: int | None) -> int:
        """Number of positive cells of a kind in slice ``z``, or in the slab if None."""
        return len(self._positive(kind, z))

    def pick(self, kind: int, z: int | None, rank: float, within: np.ndarray) -> tuple[int, np.ndarray]:
        """Take one of the cells that ``count`` counts, of which there must be at least one.

        Args:
            kind: as in ``count``.
            z: as in ``count``.
            rank: which cell, in [0, 1) of their number.
            within: (row, column) inside the cell, in [0, 1).

        Returns:
            The cell's slice, and (row, column) as fractions of the slice's height and width.
        """
        masks, cells = self.masks[kind], self._positive(kind, z)
        assert masks is not None
        inside, *cell = np.unravel_index(cells[int(rank * len(cells))], masks.shape)
        return int(inside) if z is None else z, (np.array(cell) + within) / masks.shape[1:]

    def _positive(self, kind: int, z: int | None) -> np.ndarray:
        masks = self.masks[kind]
        if masks is None:
            return np.empty(0, np.intp)
        if (kind, z) not in self._cells:
            self._cells[kind, z] = np.flatnonzero((masks if z is None else masks[z]) != 0)
        return self._cells[kind, z]


def nearest_cells(start_px: int, side_px: int, size_px: int, length_px: int, grid: int) -> np.ndarray:
    """Find the mask cell under each pixel of a view along one axis.

    The mask is enlarged to the slice, cropped and resized to the view, each nearest, as indices alone.

    Args:
        start_px: first slice pixel of the crop.
        side_px: slice pixels of the crop.
        size_px: pixels of the view.
        length_px: pixels of the slice.
        grid: cells of the mask.

    Returns:
        Indices ``(size_px,)``.

    Example:
        >>> nearest_cells(start_px=4, side_px=8, size_px=4, length_px=16, grid=8)
        array([2, 3, 4, 5])
    """
    enlarged = _nearest_indices(grid, length_px)
    cropped = enlarged[start_px : start_px + side_px]
    return cropped[_nearest_indices(side_px, size_px)]


@lru_cache(maxsize=1024)
def _nearest_indices(length: int, size: int) -> np.ndarray:
    """Input index under the centre of each output pixel, which is where the image's resize is centred too."""
    indices = (2 * np.arange(size) + 1) * length // (2 * size)
    indices.setflags(write=False)  # one array for all callers
    return indices
