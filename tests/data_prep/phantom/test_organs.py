"""Heart, vessels, airways and abdominal organs: right side, right order, right density."""

import numpy as np
import pytest

from data_prep.phantom.anatomy import TS_IDS, Anatomy
from data_prep.phantom.body import draw_body
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Grid
from data_prep.phantom.organs import draw_abdomen, draw_head
from tests.data_prep.phantom.conftest import UPRIGHT, center, draw_inside


def draw(anatomy: Anatomy) -> Canvas:
    return draw_inside(Grid(64, 96, 4.2, 5.0, -195.0, UPRIGHT), anatomy)


@pytest.fixture(scope="module")
def plain() -> Canvas:
    return draw(Anatomy())


# Positive x is the patient's left.
LEFT = (
    "spleen",
    "stomach",
    "heart",
    "kidney_left",
    "colon",
    "subclavian_artery_left",
    "atrial_appendage_left",
)
RIGHT = (
    "liver",
    "gallbladder",
    "kidney_right",
    "superior_vena_cava",
    "inferior_vena_cava",
    "brachiocephalic_trunk",
)


@pytest.mark.parametrize(("names", "sign"), [(LEFT, 1), (RIGHT, -1)])
def test_organs_lie_on_their_sides(plain, names, sign) -> None:
    for name in names:
        assert center(plain, name)[0] * sign > 5, name


def test_organs_lie_in_their_order_from_head_to_feet(plain) -> None:
    order = ("thyroid_gland", "brachiocephalic_vein_left", "heart", "liver", "kidney_right")
    assert (np.diff([center(plain, name)[2] for name in order]) < 0).all()


def test_organs_lie_in_their_order_from_front_to_back(plain) -> None:
    order = ("sternum", "heart", "esophagus", "vertebrae_T8", "autochthon_left")
    assert (np.diff([center(plain, name)[1] for name in order]) > 0).all()


def test_trachea_is_air_and_liver_is_tissue(plain) -> None:
    assert np.median(plain.hu[plain.labels == TS_IDS["trachea"]]) < -900
    assert np.median(plain.hu[plain.labels == TS_IDS["liver"]]) == pytest.approx(58)


def test_gas_in_the_stomach_gathers_in_front(plain) -> None:
    stomach = plain.labels == TS_IDS["stomach"]
    gas = np.nonzero(stomach & (plain.hu < -900))[1].mean()
    fluid = np.nonzero(stomach & (plain.hu > -100))[1].mean()
    assert gas < fluid


def test_a_stomach_outside_of_the_scan_is_no_error() -> None:
    canvas = Canvas(Grid(9, 48, 8.0, 5.0, 40.0, UPRIGHT))
    abdomen = draw_body(canvas, Anatomy())
    draw_abdomen(canvas, Anatomy(), abdomen)
    assert not (canvas.labels == TS_IDS["stomach"]).any()


def test_contrast_medium_brightens_blood_only(plain) -> None:
    enhanced = draw(Anatomy(blood_hu=(250.0, 200.0, 210.0)))
    np.testing.assert_array_equal(enhanced.labels, plain.labels)
    aorta = plain.labels == TS_IDS["aorta"]
    assert np.median(enhanced.hu[aorta]) == pytest.approx(210)
    assert np.median(plain.hu[aorta]) == pytest.approx(42)
    bone = plain.labels == TS_IDS["rib_left_5"]
    np.testing.assert_array_equal(enhanced.hu[bone], plain.hu[bone])


def test_the_heart_has_the_volume_of_its_half_axes(plain) -> None:
    volume = (plain.labels == TS_IDS["heart"]).sum() * 4.2 * 4.2 * 5.0
    axes = Anatomy().heart_axes
    # Vessels that enter the heart are their own structures.
    assert 0.75 < volume / (4 / 3 * np.pi * axes.prod()) < 1.05


def test_the_aorta_descends_in_front_of_the_spine_on_the_left(plain) -> None:
    low = np.argmin(abs(plain.grid.z + 90))
    y, x = np.nonzero(plain.labels[low] == TS_IDS["aorta"])
    assert 5 < plain.grid.x[y, x].mean() < 35
    spine = np.nonzero(plain.labels[low] == TS_IDS["vertebrae_T9"])
    assert plain.grid.y[y, x].mean() < plain.grid.y[spine].mean()


def test_a_head_has_a_skull_around_a_brain_and_nothing_of_a_chest() -> None:
    canvas = Canvas(Grid(45, 64, 4.0, 5.0, -110.0, UPRIGHT))
    draw_head(canvas)
    assert set(np.unique(canvas.labels)) == {0, TS_IDS["brain"], TS_IDS["skull"]}
    assert np.median(canvas.hu[canvas.labels == TS_IDS["skull"]]) > 500
    assert np.median(canvas.hu[canvas.labels == TS_IDS["brain"]]) == pytest.approx(34)
