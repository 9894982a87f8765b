"""What drawers are given: points in aerated lung, and fluid that lies where gravity draws it."""

import numpy as np
import pytest

from data_prep.phantom.anatomy import IS_LUNG, Anatomy, lung_points
from data_prep.phantom.body import draw_body
from data_prep.phantom.canvas import Canvas, Region
from data_prep.phantom.grid import Grid
from data_prep.phantom.lungs import grow_tree
from data_prep.phantom.scene import Fluid, Scene
from tests.data_prep.phantom.conftest import UPRIGHT


@pytest.fixture(scope="module")
def scene() -> Scene:
    anatomy = Anatomy()
    canvas = Canvas(Grid(60, 64, 6.0, 5.0, -190.0, UPRIGHT))
    draw_body(canvas, anatomy)
    return Scene(canvas, anatomy, grow_tree(anatomy, 40), Fluid((60.0, 0.0)), np.zeros(3))


@pytest.fixture(scope="module")
def lungs() -> np.ndarray:
    return lung_points(Anatomy(), np.random.default_rng(0), 5000, 1.0).T.astype(np.float32)


def test_no_depth_is_no_fluid(lungs) -> None:
    assert not Fluid((0.0, 0.0)).contains(*lungs).any()


def test_fluid_lies_on_its_side_low_and_behind(lungs) -> None:
    wet = Fluid((40.0, 0.0)).contains(*lungs)
    assert 0.02 < wet.mean() < 0.3
    assert (lungs[0][wet] < 0).all()
    dry = ~wet & (lungs[0] < 0)
    assert lungs[1][wet].mean() > lungs[1][dry].mean() + 30
    assert lungs[2][wet].mean() < lungs[2][dry].mean() - 30


def test_deeper_fluid_contains_shallower(lungs) -> None:
    shallow, deep = Fluid((20.0, 20.0)).contains(*lungs), Fluid((50.0, 50.0)).contains(*lungs)
    assert not (shallow & ~deep).any()
    assert deep.sum() > 2 * shallow.sum()


def test_points_lie_in_aerated_lung(scene) -> None:
    points = scene.points(np.random.default_rng(1), 150)
    index, inside = scene.canvas.grid.voxels_of(points)
    assert len(points) == 150
    assert inside.all()
    assert IS_LUNG[scene.canvas.labels[tuple(index.T)]].all()
    assert not scene.fluid.contains(*points.T.astype(np.float32)).any()


def test_points_do_not_depend_on_the_grid(scene) -> None:
    finer = Canvas(Grid(120, 100, 3.7, 2.5, -190.0, scene.canvas.grid.pose))
    draw_body(finer, scene.anatomy)
    coarse = scene.points(np.random.default_rng(2), 100)
    fine = scene._replace(canvas=finer).points(np.random.default_rng(2), 100)
    same = (coarse == fine).all(axis=1)
    assert same.mean() > 0.9


def test_lung_cuts_a_region(scene) -> None:
    whole = tuple(slice(0, size) for size in scene.canvas.grid.shape)
    everything = Region((whole[0], whole[1], whole[2]), np.ones(scene.canvas.grid.shape, bool))
    np.testing.assert_array_equal(scene.lung(everything).mask, IS_LUNG[scene.canvas.labels])
