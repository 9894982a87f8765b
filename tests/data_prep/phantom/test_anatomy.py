"""The analytic chest is a chest: lungs where they belong, lobes in their places, sides the right way."""

import numpy as np
import pytest

from common.cohort.cohort import load_labels
from data_prep.phantom.anatomy import (
    IS_LUNG,
    LOBES,
    LUNG_BOX,
    TS_IDS,
    Anatomy,
    back_distance,
    body_field,
    cage_field,
    dome_z,
    fissure_distances,
    in_lung,
    lobe_ids,
    lobe_name,
    lung_points,
    mediastinum,
    spine_y,
)
from data_prep.phantom.grid import Floats


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return Anatomy(dome_mm=(3.0, -2.0))


@pytest.fixture(scope="module")
def points(anatomy: Anatomy) -> np.ndarray:
    return lung_points(anatomy, np.random.default_rng(0), 4000, max_cage_field=1.0)


def columns(points: np.ndarray) -> tuple[Floats, Floats, Floats]:
    x, y, z = points.T.astype(np.float32)
    return x, y, z


def test_ids_are_totalsegmentators() -> None:
    assert TS_IDS["spleen"] == 1
    assert TS_IDS["lung_upper_lobe_left"] == 10
    assert TS_IDS["costal_cartilages"] == 117
    names = [label.name for label in load_labels("totalsegmentator")]
    assert [name for name, is_lung in zip(names, IS_LUNG, strict=True) if is_lung] == sorted(
        LOBES, key=lambda name: TS_IDS[name]
    )


def test_both_lungs_hold_about_five_litres(anatomy) -> None:
    corners = np.random.default_rng(1).uniform(LUNG_BOX[0], LUNG_BOX[1], (40_000, 3))
    share = in_lung(anatomy, *columns(corners)).mean()
    litres = share * np.prod(LUNG_BOX[1] - LUNG_BOX[0]) / 1e6
    assert 3.5 < litres < 6.5


def test_no_lung_lies_outside_of_the_sampling_box(anatomy) -> None:
    margin = 15
    wide = np.random.default_rng(2).uniform(LUNG_BOX[0] - margin, LUNG_BOX[1] + margin, (60_000, 3))
    outside = ((wide < LUNG_BOX[0]) | (wide > LUNG_BOX[1])).any(axis=1)
    assert not in_lung(anatomy, *columns(wide[outside])).any()


def test_lung_points_lie_in_the_lungs_off_mediastinum_diaphragm_and_ribs(anatomy, points) -> None:
    x, y, z = columns(points)
    assert len(points) == 4000
    assert in_lung(anatomy, x, y, z).all()
    assert not mediastinum(anatomy, x, y, z).any()
    assert (z > dome_z(anatomy, x, y)).all()
    assert (cage_field(x, y, z) < 1).all()
    assert (body_field(anatomy, x, y, z) < 1).all()


def test_lung_points_keep_off_the_ribs_on_demand(anatomy) -> None:
    inner = lung_points(anatomy, np.random.default_rng(0), 300, max_cage_field=0.4)
    assert (cage_field(*columns(inner)) < 0.4).all()


def test_lobes_lie_on_their_sides_and_in_their_order(anatomy, points) -> None:
    ids = lobe_ids(anatomy, *columns(points))
    place = {lobe: points[ids == TS_IDS[lobe]].mean(axis=0) for lobe in LOBES}
    for lobe, (x, _, _) in place.items():
        # LPS: the patient's left has positive x.
        assert x > 0 if lobe.endswith("left") else x < 0
    for side in ("left", "right"):
        upper, lower = place[f"lung_upper_lobe_{side}"], place[f"lung_lower_lobe_{side}"]
        assert upper[2] > lower[2]
        assert upper[1] < lower[1]
    middle = place["lung_middle_lobe_right"]
    assert middle[1] < place["lung_lower_lobe_right"][1]
    assert middle[2] < place["lung_upper_lobe_right"][2]


def test_the_middle_lobe_is_the_smallest(anatomy, points) -> None:
    ids = lobe_ids(anatomy, *columns(points))
    counts = {lobe: int((ids == TS_IDS[lobe]).sum()) for lobe in LOBES}
    assert min(counts, key=lambda lobe: counts[lobe]) == "lung_middle_lobe_right"
    assert min(counts.values()) > 100


def test_fissures_separate_the_lobes(anatomy, points) -> None:
    oblique, horizontal = fissure_distances(anatomy, *columns(points))
    ids = lobe_ids(anatomy, *columns(points))
    lower = np.isin(ids, [TS_IDS["lung_lower_lobe_left"], TS_IDS["lung_lower_lobe_right"]])
    np.testing.assert_array_equal(lower, oblique < 0)
    assert (horizontal[ids == TS_IDS["lung_middle_lobe_right"]] < 0).all()


def test_lobe_name_is_what_a_report_says(anatomy) -> None:
    assert lobe_name(anatomy, np.array([80.0, -40.0, 40.0])) == "left upper lobe"
    assert lobe_name(anatomy, np.array([-80.0, 60.0, -60.0])) == "right lower lobe"


def test_right_half_of_the_diaphragm_stands_higher() -> None:
    x, y = np.array([-60.0, 60.0], np.float32), np.zeros(2, np.float32)
    right, left = dome_z(Anatomy(), x, y)
    assert right > left


def test_the_spine_lies_behind_and_the_back_wall_behind_the_spine() -> None:
    z = np.array([-100.0, 0.0, 50.0], np.float32)
    assert (spine_y(z) > 30).all()
    assert (back_distance(spine_y(z), z) > 0).all()


def test_back_distance_is_zero_on_the_cage() -> None:
    z = np.array([-60.0, 0.0, 40.0], np.float32)
    y = -back_distance(np.zeros(3, np.float32), z) * -1
    np.testing.assert_allclose(cage_field(np.zeros(3, np.float32), y, z), 1.0, atol=1e-4)


def test_the_heart_lies_in_the_mediastinum_mostly_to_the_left(anatomy) -> None:
    box = np.random.default_rng(3).uniform([-90, -90, -130], [110, 60, 10], (20_000, 3))
    inside = anatomy.heart_field(*columns(box)) < 1
    assert mediastinum(anatomy, *columns(box[inside])).all()
    assert 5 < box[inside][:, 0].mean() < 30


def test_a_larger_heart_is_larger() -> None:
    box = np.random.default_rng(3).uniform([-130, -110, -160], [150, 80, 40], (20_000, 3))
    sizes = [(Anatomy(heart_scale=scale).heart_field(*columns(box)) < 1).sum() for scale in (0.9, 1.0, 1.4)]
    assert sizes[0] < sizes[1] < 0.5 * sizes[2]
