"""The coarse grid of a slab's masks: its positive positions, and the cells that a view's pixels fall in."""

# S slices, M side of the mask grid, N views, P view size

import numpy as np
import torch


class PositiveCells:
    """Positive cells of a slab's mask, in the order of slice, row and column.

    They are counted by row, and looked for in the rows that are asked for alone.

    Args:
        mask: positive where not 0.

    Shape:
        ``(S, M, M)``.

    Attributes:
        by_slice: number of positive cells in each slice ``(S,)``.

    Example:
        >>> mask = np.zeros((3, 4, 4), np.uint8)
        >>> mask[2, 1, 3] = 7
        >>> cells = PositiveCells(mask)
        >>> cells.by_slice
        array([0, 0, 1])
        >>> cells.take(np.array([0]))
        (array([2]), array([[1, 3]]))
    """

    def __init__(self, mask: np.ndarray) -> None:
        self._positive = mask != 0
        # eight cells a byte: a tenth of the time of counting cells
        by_row = np.bitwise_count(np.packbits(self._positive, axis=-1)).sum(-1, dtype=np.intp)
        self._up_to_row = by_row.ravel().cumsum()
        self.by_slice = by_row.sum(1)

    def take(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the cells of the given ranks, each from 0 to the number of positive cells, exclusive.

        Returns:
            Slices ``(N,)``, and (row, column) in the grid ``(N, 2)``.
        """
        rows = np.searchsorted(self._up_to_row, ranks, side="right")
        cells = self._positive.reshape(len(self._up_to_row), -1)[rows]
        before = self._up_to_row[rows] - cells.sum(1)
        columns = (cells.cumsum(1) == (ranks - before + 1)[:, None]).argmax(1)
        slices, rows = np.divmod(rows, self._positive.shape[1])
        return slices, np.column_stack([rows, columns])


def nearest_cells(
    starts_px: torch.Tensor, sides_px: torch.Tensor, size_px: int, lengths_px: torch.Tensor, grid: int
) -> torch.Tensor:
    """Find the mask cell under each pixel of views along one axis.

    The mask is enlarged to the slice, cropped and resized to the view, each nearest, as indices alone: the
    input under the centre of each output pixel, which is where the image's resize is centred too.

    Args:
        starts_px: first slice pixel of each crop.
        sides_px: slice pixels of each crop.
        size_px: pixels of a view, P.
        lengths_px: pixels of each slice.
        grid: cells of the mask.

    Shape:
        All ``(N,)``. Output: int64 ``(N, P)``.

    Example:
        >>> nearest_cells(torch.tensor([4]), torch.tensor([8]), 4, torch.tensor([16]), grid=8)
        tensor([[2, 3, 4, 5]])
    """
    centres = 2 * torch.arange(size_px, device=starts_px.device) + 1
    pixels = starts_px.long()[:, None] + centres * sides_px.long()[:, None] // (2 * size_px)
    return (2 * pixels + 1) * grid // (2 * lengths_px.long()[:, None])
