"""Patient coordinates of a synthetic scan's voxels, and random fields that do not depend on the grid."""

import numpy as np
import pytest

from data_prep.phantom.grid import Grid, Pose, Waves

TURNED = Pose(shift_mm=(7.0, -11.0), rotation_deg=9.0, scale=(1.1, 0.9, 1.05))


def grid(pose: Pose = TURNED) -> Grid:
    return Grid(num_slices=5, matrix=23, pixel_mm=6.0, slice_mm=4.0, bottom_mm=-9.0, pose=pose)


def everything(of: Grid) -> tuple[slice, slice, slice]:
    return slice(0, of.shape[0]), slice(0, of.shape[1]), slice(0, of.shape[2])


def test_axes_point_to_left_back_and_head_without_a_pose() -> None:
    plain = grid(Pose((0.0, 0.0), 0.0, (1.0, 1.0, 1.0)))
    np.testing.assert_allclose(plain.x[4, :2], [-66.0, -60.0])
    np.testing.assert_allclose(plain.y[:2, 4], [-66.0, -60.0])
    np.testing.assert_allclose(plain.z, [-9.0, -5.0, -1.0, 3.0, 7.0])


def test_a_pose_is_a_rotation_a_scale_and_a_shift() -> None:
    turned = grid()
    row, column = 3, 17
    angle = np.deg2rad(9.0)
    # The patient's own axes, turned and scaled, then shifted, must give back the scanner's coordinates.
    local = np.array([turned.x[row, column] * 1.1, turned.y[row, column] * 0.9])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(rotation @ local + [7.0, -11.0], [36.0, -48.0], atol=1e-4)


def test_voxels_of_finds_each_voxel_by_its_centre() -> None:
    turned = grid()
    z, y, x = (axis.reshape(-1) for axis in np.indices(turned.shape))
    points = np.stack([turned.x[y, x], turned.y[y, x], turned.z[z]], axis=1).astype(float)
    index, inside = turned.voxels_of(points)
    assert inside.all()
    np.testing.assert_array_equal(index, np.stack([z, y, x], axis=1))


def test_voxels_of_says_which_points_lie_outside() -> None:
    _, inside = grid().voxels_of(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 999.0], [-999.0, 0.0, 0.0]]))
    assert inside.tolist() == [True, False, False]


def test_a_box_holds_every_voxel_within_its_half_sizes() -> None:
    turned = grid()
    center, half = np.array([10.0, -20.0, 1.0]), np.array([31.0, 17.0, 5.0])
    dx, dy, dz = turned.offsets(everything(turned), center)
    within = (np.abs(dx) < half[0]) & (np.abs(dy) < half[1]) & (np.abs(dz) < half[2])
    held = np.zeros(turned.shape, bool)
    held[turned.box(center, half)] = True
    assert within.any()
    assert not (within & ~held).any()
    assert held.sum() < held.size / 2


def test_a_box_outside_of_the_volume_is_empty() -> None:
    box = grid().box((0.0, 0.0, 500.0), (10.0, 10.0, 10.0))
    assert np.zeros(grid().shape)[box].size == 0


@pytest.mark.parametrize("sizes", [(0, 23), (5, 0)])
def test_grid_refuses_empty_volumes(sizes) -> None:
    with pytest.raises(ValueError, match="num_slices and matrix must be positive"):
        Grid(sizes[0], sizes[1], 1.0, 1.0, 0.0, TURNED)


@pytest.mark.parametrize("spacing", [(0.0, 1.0), (1.0, -2.0), (float("nan"), 1.0)])
def test_grid_refuses_spacing_that_is_not_positive(spacing) -> None:
    with pytest.raises(ValueError, match="pixel_mm and slice_mm must be positive"):
        Grid(2, 3, spacing[0], spacing[1], 0.0, TURNED)


def test_waves_have_the_same_value_on_a_grid_as_at_its_points() -> None:
    turned = grid()
    waves = Waves(np.random.default_rng(3), 40.0)
    box = (slice(1, 4), slice(2, 19), slice(5, 12))
    z, y, x = (axis.reshape(-1) for axis in np.indices(turned.shape))
    points = np.stack([turned.x[y, x], turned.y[y, x], turned.z[z]], axis=1)
    expected = waves.at(points).reshape(turned.shape)[box]
    np.testing.assert_allclose(waves.on(turned, box), expected, atol=2e-4)


def test_waves_have_zero_mean_and_unit_variance() -> None:
    points = np.random.default_rng(0).uniform(-400, 400, (20_000, 3))
    values = Waves(np.random.default_rng(1), 30.0).at(points)
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05
