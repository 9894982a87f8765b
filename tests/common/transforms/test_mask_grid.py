"""Positive cells are found in their order, and views find the cells that explicit resizes would show."""

import numpy as np
import pytest
import torch

from common.transforms.mask_grid import PositiveCells, nearest_cells


def nearest_resize(length: int, size: int) -> list[int]:
    """Input index under the centre of every output pixel, in whole numbers."""
    return [((2 * i + 1) * length) // (2 * size) for i in range(size)]


@pytest.mark.parametrize("length", [512, 768, 333, 101, 128, 127])
@pytest.mark.parametrize(("share", "size"), [(1.0, 256), (0.6, 224), (0.3, 144), (0.45, 17)])
def test_cells_equal_enlarge_crop_and_resize_step_by_step(length, share, size):
    grid = 128
    enlarged = np.arange(grid)[nearest_resize(grid, length)]
    side = int(length * share)
    starts = [0, (length - side) // 3, length - side]
    many = [torch.tensor(values) for values in (starts, [side] * 3, [length] * 3)]
    found = nearest_cells(many[0], many[1], size, many[2], grid)
    for cells, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(cells, enlarged[start : start + side][nearest_resize(side, size)])


def test_views_of_slices_of_different_sizes_are_looked_up_together():
    starts, sides, lengths = torch.tensor([3, 0]), torch.tensor([7, 40]), torch.tensor([11, 97])
    together = nearest_cells(starts, sides, 5, lengths, 16)
    for view in range(2):
        one = slice(view, view + 1)
        assert torch.equal(together[one], nearest_cells(starts[one], sides[one], 5, lengths[one], 16))


@pytest.mark.parametrize("shape", [(5, 11, 7), (1, 3, 70), (4, 128, 128)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_rank_is_the_cell_that_a_search_through_the_mask_finds(shape, dtype):
    rng = np.random.default_rng(0)
    mask = rng.integers(1, 118, shape).astype(dtype) * (rng.random(shape) < 0.1)
    mask[0] = 0 if shape[0] > 1 else mask[0]
    if dtype == np.uint16:
        mask[mask > 0] = 1 << 13  # whose low byte is 0
    expected = np.argwhere(mask != 0)
    cells = PositiveCells(mask)
    assert cells.by_slice.tolist() == [(one != 0).sum() for one in mask]
    slices, places = cells.take(np.arange(len(expected)))
    np.testing.assert_array_equal(np.column_stack([slices, places]), expected)
    assert len(expected) > 10


def test_an_empty_mask_has_no_positive_cells():
    assert PositiveCells(np.zeros((2, 3, 5), np.uint8)).by_slice.tolist() == [0, 0]
