"""Body wall and skeleton: what is drawn lies where anatomists look for it."""

import numpy as np
import pytest

from data_prep.phantom.anatomy import IS_LUNG, TS_IDS, Anatomy
from data_prep.phantom.body import draw_body, draw_skeleton, draw_tube, polyline
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Grid
from tests.data_prep.phantom.conftest import UPRIGHT, center


def draw(anatomy: Anatomy) -> tuple[Canvas, np.ndarray]:
    canvas = Canvas(Grid(62, 96, 4.2, 5.0, -188.0, UPRIGHT))
    abdomen = draw_body(canvas, anatomy)
    draw_skeleton(canvas, anatomy)
    return canvas, abdomen


@pytest.fixture(scope="module")
def drawn() -> tuple[Canvas, np.ndarray]:
    return draw(Anatomy())


def test_all_ribs_lie_on_their_side_and_one_below_the_other(drawn) -> None:
    for side, sign in (("left", 1), ("right", -1)):
        ribs = [center(drawn[0], f"rib_{side}_{number}") for number in range(1, 13)]
        assert all(rib[0] * sign > 10 for rib in ribs)
        assert (np.diff([rib[2] for rib in ribs]) < 0).all()


def test_vertebrae_lie_in_the_middle_one_below_the_other(drawn) -> None:
    spine = [center(drawn[0], f"vertebrae_{name}") for name in ["C7", *(f"T{n}" for n in range(1, 13)), "L1"]]
    assert all(abs(vertebra[0]) < 3 for vertebra in spine)
    np.testing.assert_allclose(-np.diff([vertebra[2] for vertebra in spine]), 22.5, atol=8)


def test_the_cord_runs_behind_the_vertebral_bodies_and_the_sternum_lies_in_front(drawn) -> None:
    cord, sternum = center(drawn[0], "spinal_cord"), center(drawn[0], "sternum")
    z, y, _ = np.nonzero(np.isin(drawn[0].labels, [TS_IDS[f"vertebrae_T{n}"] for n in range(5, 9)]))
    assert cord[1] > drawn[0].grid.y[y, 48].min() + 20
    assert sternum[1] < -60


@pytest.mark.parametrize("name", ["scapula", "clavicula", "humerus", "autochthon"])
def test_paired_structures_lie_on_their_sides(drawn, name) -> None:
    left, right = center(drawn[0], f"{name}_left"), center(drawn[0], f"{name}_right")
    assert left[0] > 10
    assert right[0] == pytest.approx(-left[0], abs=6)


def test_bones_are_bright_lungs_dark_and_air_surrounds_the_body(drawn) -> None:
    canvas, _ = drawn
    bones = [
        TS_IDS[name] for name in ("rib_left_5", "vertebrae_T6", "sternum", "scapula_left", "humerus_left")
    ]
    assert np.median(canvas.hu[np.isin(canvas.labels, bones)]) > 200
    assert np.percentile(canvas.hu[IS_LUNG[canvas.labels]], [1, 99]).tolist() == pytest.approx(
        [-910, -760], abs=90
    )
    assert (canvas.hu[:, 0] == -1000).all()


def test_more_fat_makes_a_wider_body_of_more_fat(drawn) -> None:
    stout, _ = draw(Anatomy(fat_mm=35.0))
    assert (stout.hu > -900).sum() > 1.1 * (drawn[0].hu > -900).sum()
    fat = [((canvas.hu < -80) & (canvas.hu > -120)).sum() for canvas in (drawn[0], stout)]
    assert fat[1] > 1.5 * fat[0]
    # The chest inside the ribs is the same.
    np.testing.assert_array_equal(
        stout.labels == TS_IDS["rib_left_5"], drawn[0].labels == TS_IDS["rib_left_5"]
    )


def test_breasts_lie_in_front_of_the_chest_wall(drawn) -> None:
    female, _ = draw(Anatomy(female=True))
    added = (female.hu > -900) & (drawn[0].hu < -900)
    z, y, x = np.nonzero(added)
    assert len(z)
    assert female.grid.y[y, x].max() < -60
    assert added[:, :, :48].any()
    assert added[:, :, 48:].any()


def test_lowered_arms_lie_beside_the_body(drawn) -> None:
    lowered, _ = draw(Anatomy(arms_down=True))
    assert center(lowered, "humerus_left")[2] < center(drawn[0], "humerus_left")[2] - 40
    assert abs(center(lowered, "humerus_right")[0]) > 160


def test_the_abdomen_lies_below_the_lungs(drawn) -> None:
    canvas, abdomen = drawn
    assert abdomen[0].any()
    assert not abdomen[canvas.grid.z > -60].any()
    assert not (abdomen & IS_LUNG[canvas.labels]).any()


def test_deeper_breath_gives_larger_lungs(drawn) -> None:
    deep, _ = draw(Anatomy(dome_mm=(-18.0, -18.0)))
    assert IS_LUNG[deep.labels].sum() > 1.05 * IS_LUNG[drawn[0].labels].sum()


def test_polyline_has_its_ends_its_corner_and_its_step() -> None:
    points = polyline(np.array([[0.0, 0, 0], [30, 0, 0], [30, 40, 0]]), 2.0)
    np.testing.assert_allclose(points[[0, -1]], [[0, 0, 0], [30, 40, 0]])
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    assert steps.max() <= 2.0 + 1e-9
    assert steps.sum() == pytest.approx(70, abs=1)


def test_a_tube_has_the_volume_of_a_cylinder() -> None:
    canvas = Canvas(Grid(60, 80, 1.5, 1.5, -45.0, UPRIGHT))
    region = draw_tube(canvas, np.array([[0.0, 0, -40], [0.0, 0, 35]]), 8.0, 300.0)
    assert region.num_voxels() * 1.5**3 == pytest.approx(
        np.pi * 8.0**2 * 75 + 4 / 3 * np.pi * 8.0**3, rel=0.05
    )
