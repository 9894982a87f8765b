"""Positions of a mask grid are drawn uniformly, and views find the cells that explicit resizes would show."""

import numpy as np
import pytest

from common.transforms.mask_grid import MaskPositions, nearest_cells


def nearest_resize(length: int, size: int) -> list[int]:
    """Input index under the centre of every output pixel, in whole numbers."""
    return [((2 * i + 1) * length) // (2 * size) for i in range(size)]


@pytest.mark.parametrize("length", [512, 768, 333, 101, 128, 127])
@pytest.mark.parametrize(("share", "size"), [(1.0, 256), (0.6, 224), (0.3, 144), (0.45, 17)])
def test_cells_equal_enlarge_crop_and_resize_step_by_step(length, share, size):
    grid = 128
    enlarged = np.arange(grid)[nearest_resize(grid, length)]
    side = int(length * share)
    for start in {0, (length - side) // 3, length - side}:
        cropped = enlarged[start : start + side]
        expected = cropped[nearest_resize(side, size)]
        np.testing.assert_array_equal(nearest_cells(start, side, size, length, grid), expected)


def test_positions_are_uniform_over_the_cells_of_all_slices():
    masks = np.zeros((5, 11, 7), np.uint8)
    masks[1, 2, 3:6] = 9
    masks[4, 10, 6] = 117
    positions = MaskPositions({1: masks})
    assert positions.count(1, None) == 4
    ranks = (np.arange(4) + 0.5) / 4
    picked = [positions.pick(1, None, rank, np.zeros(2)) for rank in ranks]
    assert [z for z, _ in picked] == [1, 1, 1, 4]
    np.testing.assert_allclose(
        [place for _, place in picked], [[2 / 11, 3 / 7], [2 / 11, 4 / 7], [2 / 11, 5 / 7], [10 / 11, 6 / 7]]
    )


def test_positions_of_one_slice_ignore_the_others():
    masks = np.zeros((5, 11, 7), np.uint16)
    masks[1, 2, 3:6] = 1 << 13
    masks[4, 10, 6] = 1
    positions = MaskPositions({2: masks})
    assert [positions.count(2, z) for z in range(5)] == [0, 3, 0, 0, 1]
    z, place = positions.pick(2, 4, 0.99, np.array([0.5, 0.25]))
    assert z == 4
    np.testing.assert_allclose(place, [10.5 / 11, 6.25 / 7])


def test_absent_mask_has_no_positions():
    assert MaskPositions({1: None}).count(1, None) == 0
    assert MaskPositions({1: np.zeros((2, 3, 5), np.uint8)}).count(1, 1) == 0
