"""Counts masks under views into soft labels of each whole view (CLS) and of each of its patches."""

# N views, S view size, P patches in row-major order, G patches along a side, M side of the mask grid,
# D mask cells that a patch may touch along a side, L planes, C classes

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from common.transforms.multi_crop import nearest_cells


class PatchCells(NamedTuple):
    """Cells of the mask grid under each row and each column of patches, and how many pixels show each.

    The nearest resize of a mask is separable, so that a pixel's cell is its row's and its column's. A patch
    touches few cells: with 16 pixels a side at the paper's scales at most 9 x 9, where it has 256 pixels.
    Where cells are smaller than pixels, D is ``patch_size_px``: each pixel's cell, with 1 pixel over it.

    ``rows``, ``columns`` int64 (N, G, D): cells, clipped to the grid. ``row_pixels``, ``column_pixels``
    float32 (N, G, D): pixels over each, ``patch_size_px`` in all; 0 for cells that the patch does not touch.
    """

    rows: torch.Tensor
    row_pixels: torch.Tensor
    columns: torch.Tensor
    column_pixels: torch.Tensor
    patch_size_px: int


def most_cells_per_patch(side_px: int, size_px: int, length_px: int, patch_size_px: int, grid: int) -> int:
    """Bound the mask cells that a patch touches along one axis, D.

    Args:
        side_px: slice pixels of the crop.
        size_px: pixels of the view, S.
        length_px: pixels of the slice.
        patch_size_px: pixels of a patch.
        grid: cells of the mask, M.
    """
    slice_pixels = math.ceil((patch_size_px - 1) * side_px / size_px)
    return math.ceil(slice_pixels * grid / length_px) + 1


def patch_cells(
    boxes: torch.Tensor,
    flips: torch.Tensor,
    shapes: torch.Tensor,
    *,
    size_px: int,
    patch_size_px: int,
    grid: int,
    most_cells: int,
) -> PatchCells:
    """Find the mask cells under the patches of views.

    Args:
        boxes: boxes of ``ViewPlan``: slice, top, left, side.
        flips: whether a view is mirrored, columns reversed.
        shapes: height and width of each view's slice.
        size_px: see ``most_cells_per_patch``.
        patch_size_px: see ``most_cells_per_patch``.
        grid: see ``most_cells_per_patch``.
        most_cells: D, at least ``most_cells_per_patch`` of every view; stated because the device is not
            asked.

    Shape:
        ``boxes (N, 4)``, ``flips (N,)``, ``shapes (N, 2)``.

    Raises:
        ValueError: if patches do not tile a view.
    """
    if patch_size_px < 1 or size_px % patch_size_px:
        raise ValueError(f"size_px must be a multiple of patch_size_px, got {size_px} and {patch_size_px}.")
    axes: list[torch.Tensor] = []
    for axis in (0, 1):
        cells = nearest_cells(boxes[:, 1 + axis], boxes[:, 3], size_px, shapes[:, axis], grid)
        if axis == 1:
            cells = torch.where(flips[:, None], cells.flip(1), cells)
        patches = cells.unflatten(1, (-1, patch_size_px))
        if most_cells >= patch_size_px:  # there are no more pixels than that to look at
            axes += [patches, torch.ones_like(patches, dtype=torch.float32)]
            continue
        touched = patches.amin(2, keepdim=True) + torch.arange(most_cells, device=boxes.device)
        pixels = (patches[..., None, :] == touched[..., None]).sum(-1).float()
        axes += [touched.clamp_(max=grid - 1), pixels]
    rows, row_pixels, columns, column_pixels = axes
    return PatchCells(rows, row_pixels, columns, column_pixels, patch_size_px)


def coverage_fractions(
    planes: torch.Tensor, plane: torch.Tensor, cells: PatchCells, num_classes: int = 118
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which share of the pixels each class covers, in the whole view and in each patch.

    Exactly average pooling of the one-hot map of the mask enlarged to the slice, cropped and resized to the
    view, each nearest; but no pixel is looked at.

    Source: DALE-CT III-C2.

    Args:
        planes: ``(L, M, M)`` of integers, class of every cell, background included.
        plane: ``(N,)``, which of them lies under each view.
        cells: cells of the views.
        num_classes: C. TotalSegmentator's task "total" with the background: 118. What shards hold is below.

    Returns:
        ``cls (N, C)`` and ``patches (N, P, C)``, float32.

    Example:
        >>> planes = torch.tensor([[[0, 1], [0, 2]]], dtype=torch.uint8)
        >>> box, shape = torch.tensor([[0, 0, 0, 4]]), torch.tensor([[4, 4]])
        >>> sizes = {"size_px": 4, "patch_size_px": 2, "grid": 2, "most_cells": 2}
        >>> cells = patch_cells(box, torch.tensor([False]), shape, **sizes)
        >>> coverage_fractions(planes, torch.tensor([0]), cells, num_classes=3)[0]
        tensor([[0.5000, 0.2500, 0.2500]])
    """
    classes, pixels = _cells_of_patches(planes, plane, cells)
    counts = pixels.new_zeros(*pixels.shape[:2], num_classes).scatter_add_(2, classes, pixels)
    return _shares(counts, cells.patch_size_px)


def finding_presence(
    planes: torch.Tensor, plane: torch.Tensor, cells: PatchCells, num_classes: int = 14
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 for each finding that at least one pixel shows, in the whole view and in each patch.

    As ``coverage_fractions``, of ``planes`` with bit k for the k-th finding of
    ``common/labels/rexgroundingct.csv``.

    Source: DALE-CT III-C2.
    """
    counts = _finding_counts(planes, plane, cells, num_classes)
    return counts.any(1).float(), (counts > 0).float()


def finding_fractions(
    planes: torch.Tensor, plane: torch.Tensor, cells: PatchCells, num_classes: int = 14
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which share of the pixels shows each finding; arguments as in ``finding_presence``.

    Source: released DALE-CT code; the paper's text says presence.
    """
    return _shares(_finding_counts(planes, plane, cells, num_classes), cells.patch_size_px)


Labels = Callable[[torch.Tensor, torch.Tensor, PatchCells], tuple[torch.Tensor, torch.Tensor]]
REX_TARGETS: Mapping[str, Labels] = {"presence": finding_presence, "fraction": finding_fractions}
"""What a finding's soft label is, by the name that recipes use."""


def _cells_of_patches(
    planes: torch.Tensor, plane: torch.Tensor, cells: PatchCells
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the cells under each patch, int64, and their numbers of pixels, float32: (N, P, D * D)."""
    num_views, patches, touched = cells.rows.shape
    rows = (cells.rows + plane.long()[:, None, None] * planes.shape[1]).flatten()
    # whole rows first, then columns of them: an index a row and not one a cell
    of_rows = planes.flatten(0, 1).index_select(0, rows).view(num_views, patches * touched, -1)
    columns = cells.columns.flatten(1)[:, None].expand(-1, patches * touched, -1)
    values = of_rows.gather(2, columns).view(num_views, patches, touched, -1, touched).transpose(2, 3)
    values = values.reshape(num_views, -1, touched * touched)  # while they are bytes
    pixels = cells.row_pixels[:, :, None, :, None] * cells.column_pixels[:, None, :, None, :]
    return values.long(), pixels.reshape(values.shape)


def _finding_counts(
    planes: torch.Tensor, plane: torch.Tensor, cells: PatchCells, num_classes: int
) -> torch.Tensor:
    """Return how many pixels of each patch have each bit, (N, P, C)."""
    if planes.device.type == "cpu":  # elsewhere looking which planes are empty would wait for the device
        return _counts_of_what_is_shown(planes, plane, cells, num_classes)
    bits, pixels = _cells_of_patches(planes, plane, cells)
    return torch.stack([_pixels_with(bits, pixels, k) for k in range(num_classes)], dim=-1)


def _counts_of_what_is_shown(
    planes: torch.Tensor, plane: torch.Tensor, cells: PatchCells, num_classes: int
) -> torch.Tensor:
    """Count bits in planes and patches that are not empty alone: most are, and the others have few bits."""
    shown = planes.flatten(1).any(1)[plane]
    counts = torch.zeros(len(plane), cells.rows.shape[1] * cells.columns.shape[1], num_classes)
    if shown.any():
        rows, row_pixels, columns, column_pixels, patch_size_px = cells
        views = PatchCells(
            rows[shown], row_pixels[shown], columns[shown], column_pixels[shown], patch_size_px
        )
        bits, pixels = _cells_of_patches(planes, plane[shown], views)
        where = torch.zeros(counts.shape[:2], dtype=torch.bool)
        where[shown] = bits.any(2)
        bits, pixels = bits[where[shown]], pixels[where[shown]]
        counts[where] = torch.stack([_pixels_with(bits, pixels, k) for k in range(num_classes)], dim=-1)
    return counts


def _pixels_with(bits: torch.Tensor, pixels: torch.Tensor, k: int) -> torch.Tensor:
    return (((bits >> k) & 1) * pixels).sum(-1)


def _shares(counts: torch.Tensor, patch_size_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide the patches' pixel counts, and their sum over the view, by the number of pixels.

    Counts are whole numbers below 2^24, which float32 adds exactly in any order.
    """
    patch_area = patch_size_px**2
    return counts.sum(1) / (counts.shape[1] * patch_area), counts.div_(patch_area)
