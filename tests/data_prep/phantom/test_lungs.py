"""Vessels and bronchi grow from the hila into the lungs."""

import numpy as np
import pytest

from data_prep.phantom.anatomy import IS_LUNG, Anatomy, in_lung
from data_prep.phantom.body import draw_body
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Grid
from data_prep.phantom.lungs import HILA, Tree, airway_points, draw_airways, draw_vessels, grow_tree
from tests.data_prep.phantom.conftest import UPRIGHT


@pytest.fixture(scope="module")
def tree() -> Tree:
    return grow_tree(Anatomy(seed=(5,)), num_tips=300)


@pytest.fixture
def canvas() -> Canvas:
    drawn = Canvas(Grid(30, 96, 3.6, 5.0, -95.0, UPRIGHT))
    draw_body(drawn, Anatomy())
    return drawn


def test_every_branch_starts_at_a_hilum_or_at_the_end_of_another(tree) -> None:
    starts = {tuple(start) for start in tree.start}
    ends = {tuple(end) for end in tree.end} | {tuple(hilum) for hilum in HILA.values()}
    assert starts <= ends


def test_tips_lie_in_the_lung_of_their_hilum(tree) -> None:
    assert in_lung(Anatomy(seed=(5,)), *tree.end.T.astype(np.float32)).all()
    assert (np.sign(tree.start[:, 0]) == np.sign(tree.end[:, 0])).all()


def test_no_branch_is_thicker_than_the_one_that_feeds_it(tree) -> None:
    radius = {tuple(end): r for end, r in zip(tree.end, tree.radius_mm, strict=True)}
    pairs = [
        (radius[tuple(s)], r) for s, r in zip(tree.start, tree.radius_mm, strict=True) if tuple(s) in radius
    ]
    assert len(pairs) > 200
    assert all(feeding >= fed for feeding, fed in pairs)
    assert tree.radius_mm.max() > 3 * tree.radius_mm.min()


def test_points_follow_the_branches_from_start_to_end(tree) -> None:
    points, radius, branch = tree.points(2.0)
    first = np.searchsorted(branch, np.arange(len(tree.end)))
    last = np.searchsorted(branch, np.arange(len(tree.end)), side="right") - 1
    np.testing.assert_allclose(points[first], tree.start, atol=1e-9)
    np.testing.assert_allclose(points[last], tree.end, atol=1e-9)
    np.testing.assert_array_equal(radius, tree.radius_mm[branch])
    same = branch[1:] == branch[:-1]
    assert np.percentile(np.linalg.norm(np.diff(points, axis=0), axis=1)[same], 95) < 2.5


def test_points_can_be_limited_to_some_branches(tree) -> None:
    _, _, branch = tree.points(2.0, tree.radius_mm > 2)
    assert set(branch) == set(np.flatnonzero(tree.radius_mm > 2))


def test_the_same_patient_has_the_same_vessels(tree) -> None:
    again = grow_tree(Anatomy(seed=(5,)), num_tips=300)
    np.testing.assert_array_equal(tree.end, again.end)
    other = grow_tree(Anatomy(seed=(6,)), num_tips=300)
    assert not np.array_equal(tree.end, other.end)


def test_vessels_brighten_the_lungs_and_leave_the_rest(tree, canvas) -> None:
    before = canvas.hu.copy()
    lung = IS_LUNG[canvas.labels]
    draw_vessels(canvas, Anatomy(), tree)
    np.testing.assert_array_equal(canvas.hu[~lung], before[~lung])
    assert (canvas.hu[lung] >= before[lung] - 1e-3).all()
    assert 0.01 < (canvas.hu[lung] > before[lung] + 100).mean() < 0.15


def test_bronchi_run_beside_the_vessels(tree, canvas) -> None:
    points, inner = airway_points(canvas, Anatomy(), tree)
    vessel, radius, _ = tree.points(1.0)
    gap = np.sqrt(((points[::7, None] - vessel[None]) ** 2).sum(axis=2))
    nearest = gap.argmin(axis=1)
    assert np.median(gap.min(axis=1) / (radius[nearest] + inner[::7])) > 0.8
    assert gap.min(axis=1).max() < 16


def test_bronchi_have_air_inside_of_a_wall(tree) -> None:
    canvas = Canvas(Grid(16, 192, 1.5, 2.5, -50.0, UPRIGHT))
    draw_body(canvas, Anatomy())
    lung = IS_LUNG[canvas.labels]
    before = canvas.hu.copy()
    region = draw_airways(canvas, Anatomy(), tree, wall_mm=3.0)
    inside = canvas.hu[region.box][region.mask]
    assert inside.min() < -930
    assert inside.max() > -200
    np.testing.assert_array_equal(canvas.hu[~lung], before[~lung])
