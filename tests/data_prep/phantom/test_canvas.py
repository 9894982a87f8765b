"""Shapes have the volume that geometry says, wherever the patient lies."""

import numpy as np
import pytest

from data_prep.phantom.canvas import Canvas, Region
from data_prep.phantom.grid import Grid, Pose

STRAIGHT = Pose((0.0, 0.0), 0.0, (1.0, 1.0, 1.0))
TURNED = Pose((6.0, -5.0), 14.0, (1.08, 0.93, 1.1))


def canvas(pose: Pose = STRAIGHT, voxel_mm: float = 1.5) -> Canvas:
    return Canvas(Grid(71, 83, voxel_mm, voxel_mm, -52.0, pose))


def volume_mm3(drawn: Canvas, region: Region) -> float:
    """Volume in patient millimetres."""
    return region.num_voxels() * float(np.prod(drawn.grid.voxel))


@pytest.mark.parametrize("pose", [STRAIGHT, TURNED])
@pytest.mark.parametrize(("angle_deg", "lean"), [(0.0, 0.0), (35.0, 0.0), (-60.0, 0.4)])
def test_ellipsoid_has_the_volume_of_its_half_axes(pose, angle_deg, lean) -> None:
    drawn = canvas(pose)
    region = drawn.ellipsoid((4.0, -3.0, 2.0), (26.0, 15.0, 19.0), angle_deg, lean)
    # Leaning is a shear: it keeps the volume.
    assert volume_mm3(drawn, region) == pytest.approx(4 / 3 * np.pi * 26 * 15 * 19, rel=0.01)


def test_ellipsoid_turns_from_the_left_to_the_back() -> None:
    drawn = canvas()
    box, field = drawn.ellipsoid_field((0.0, 0.0, 0.0), (30.0, 6.0, 6.0), angle_deg=45.0)
    dx, dy, _ = drawn.grid.offsets(box)
    inside = (field < 1).any(axis=0)
    assert float((dx[0] * dy[0])[inside].mean()) > 50


def test_column_has_the_volume_of_a_cone() -> None:
    drawn = canvas(TURNED)
    region = drawn.column([-40, 40], [-5, 9], 3.0, [8.0, 24.0], [8.0, 24.0])
    assert volume_mm3(drawn, region) == pytest.approx(np.pi * 80 / 3 * (8**2 + 8 * 24 + 24**2), rel=0.03)


def test_stamped_ball_adds_the_volume_of_a_ball() -> None:
    drawn = canvas(TURNED, voxel_mm=1.5)
    drawn.hu[:] = 0.0
    drawn.stamp(np.array([[3.2, -4.1, 0.7]]), 9.0, 1000.0)
    # In z a ball reaches half a slice further: thick slices show all that touches them.
    reach = 0.5 * drawn.grid.voxel[0]
    closed = 4 / 3 * np.pi * 9.0**3 + np.pi * 9.0**2 * 2 * reach
    assert drawn.hu.sum() / 1000 * np.prod(drawn.grid.voxel) == pytest.approx(closed, rel=0.02)


def test_stamp_equals_a_loop_over_balls_and_voxels() -> None:
    pose = Pose((2.0, 1.0), 11.0, (1.1, 0.95, 1.0))
    drawn = Canvas(Grid(7, 19, 3.0, 5.0, -15.0, pose))
    rng = np.random.default_rng(5)
    points, radius = rng.uniform(-30, 30, (17, 3)) * [1, 1, 0.7], rng.uniform(0.8, 9.0, 17)
    drawn.stamp(points, radius, 200.0)
    grid = drawn.grid
    expected = np.full(grid.shape, -1000.0)
    cover = np.zeros(grid.shape)
    _, inside = grid.voxels_of(points)
    for (px, py, pz), r in zip(points[inside], radius[inside], strict=True):
        for z, y, x in np.ndindex(grid.shape):
            dz = max(abs(grid.z[z] - pz) - 0.5 * grid.voxel[0], 0.0)
            distance = np.sqrt((grid.x[y, x] - px) ** 2 + (grid.y[y, x] - py) ** 2 + dz**2)
            share = min(max((r - distance) / grid.voxel[2] + 0.5, 0.0), 1.0)
            share *= min(1.0, np.pi * (r / grid.voxel[2]) ** 2) ** 0.7
            cover[z, y, x] = max(cover[z, y, x], share)
    expected += cover * 1200.0
    np.testing.assert_allclose(drawn.hu, expected, atol=0.5)


def test_stamp_returns_the_voxels_that_are_at_least_half_covered() -> None:
    drawn = canvas()
    region = drawn.stamp(np.array([[0.0, 0.0, 0.0]]), 7.0, 0.0, label=6)
    whole = np.zeros(drawn.grid.shape, bool)
    whole[region.box] = region.mask
    np.testing.assert_array_equal(whole, drawn.hu >= -500)
    np.testing.assert_array_equal(whole, drawn.labels == 6)


def test_stamp_of_a_speck_still_has_a_region() -> None:
    drawn = canvas()
    assert drawn.stamp(np.array([[0.4, 0.3, 0.2]]), 0.3, 500.0).num_voxels() > 0


def test_stamp_stays_on_the_labels_it_is_given() -> None:
    drawn = canvas()
    drawn.labels[:, :, :41] = 12
    only = np.arange(118) == 12
    region = drawn.stamp(np.array([[-1.0, 0.0, 0.0], [30.0, 0.0, 0.0]]), 8.0, 40.0, only_labels=only)
    assert region.num_voxels() > 0
    assert (drawn.hu[:, :, 41:] == -1000).all()
    assert (drawn.hu[:, :, :41] > -1000).any()


def test_stamp_outside_of_the_volume_draws_nothing() -> None:
    drawn = canvas()
    assert drawn.stamp(np.array([[0.0, 0.0, 900.0]]), 8.0, 40.0).num_voxels() == 0
    assert (drawn.hu == -1000).all()


def test_stamp_across_the_edge_is_cut() -> None:
    drawn = canvas()
    edge = np.array([[float(drawn.grid.x[0, 0]), float(drawn.grid.y[0, 0]), float(drawn.grid.z[0])]])
    drawn.stamp(edge, 6.0, 40.0)
    assert drawn.hu[0, 0, 0] == pytest.approx(40.0)
    assert drawn.hu[-1, -1, -1] == -1000


def test_paint_leaves_what_is_none() -> None:
    drawn = canvas()
    region = drawn.ellipsoid((0.0, 0.0, 0.0), (9.0, 9.0, 9.0))
    drawn.paint(region, hu=30.0)
    assert (drawn.labels == 0).all()
    drawn.paint(region, label=51)
    assert drawn.hu[drawn.labels == 51].tolist() == [30.0] * region.num_voxels()
