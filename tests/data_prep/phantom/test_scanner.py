"""What the scanner makes of a drawing: noise, blur, bias, padding and table as the protocol says."""

import numpy as np
import pytest

from data_prep.phantom.anatomy import Anatomy
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.population import Person, draw_person, roster
from data_prep.phantom.scanner import (
    SITES,
    Kernel,
    Protocol,
    acquire,
    draw_protocol,
    draw_table,
    scan_grid,
)
from tests.data_prep.phantom.conftest import UPRIGHT

PERSON = Person("F", 50, Anatomy(), UPRIGHT)
PROTOCOL = Protocol(
    kernel=Kernel("PLAIN", 0.0, 0.0, 1.0),
    noise_hu=0.0,
    slice_mm=5.0,
    pixel_mm=6.0,
    num_slices=11,
    bottom_mm=-30.0,
    circle=False,
    bias_hu=0.0,
    intercept=-1024,
    axcodes="LPS",
    table_curve_mm=600.0,
    is_enhanced=False,
)


def canvas(matrix: int = 64, hu: float = 40.0) -> Canvas:
    drawn = Canvas(scan_grid(PROTOCOL, PERSON, matrix))
    drawn.hu[:] = hu
    return drawn


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_perfect_scanner_stores_rounded_clipped_hu() -> None:
    drawn = canvas()
    drawn.hu[0, 0, :4] = [-5000.0, 12.4, 12.6, 9000.0]
    hu = acquire(drawn, PROTOCOL, rng())
    assert hu.dtype == np.int16
    assert hu[0, 0, :5].tolist() == [-1024, 12, 13, 3071, 40]


def test_bias_shifts_every_voxel() -> None:
    assert (acquire(canvas(), PROTOCOL._replace(bias_hu=14.0), rng()) == 54).all()


@pytest.mark.parametrize("texture", [-0.16, 0.0, 0.2])
def test_noise_has_its_strength_in_the_middle_whatever_its_texture(texture) -> None:
    protocol = PROTOCOL._replace(noise_hu=20.0, kernel=Kernel("K", 0.0, texture, 1.0))
    hu = acquire(canvas(96), protocol, rng())
    middle = hu[:, 40:56, 40:56].std()
    # The strength in the middle is stated as 1.1 of noise_hu.
    assert middle == pytest.approx(22.0, rel=0.08)
    assert hu[:, :8].std() < 0.7 * middle


def test_texture_sets_the_correlation_of_neighbours() -> None:
    correlation = []
    for texture in (-0.16, 0.0, 0.2):
        protocol = PROTOCOL._replace(noise_hu=20.0, kernel=Kernel("K", 0.0, texture, 1.0))
        noise = acquire(canvas(), protocol, rng()).astype(float) - 40
        correlation.append((noise[:, :, 1:] * noise[:, :, :-1]).mean() / (noise**2).mean())
    assert correlation[0] < -0.1
    assert abs(correlation[1]) < 0.02
    assert correlation[2] > 0.1


def test_blur_spreads_a_point_and_keeps_its_sum() -> None:
    drawn = canvas(hu=0.0)
    drawn.hu[5, 20, 30] = 1000.0
    hu = acquire(drawn, PROTOCOL._replace(kernel=Kernel("K", 0.2, 0.0, 1.0)), rng())
    # (0.1, 0.8, 0.1) along rows and columns.
    np.testing.assert_array_equal(hu[5, 19:22, 29:32], [[10, 80, 10], [80, 640, 80], [10, 80, 10]])
    assert hu.sum() == 1000


def test_blur_keeps_a_constant_up_to_the_border() -> None:
    hu = acquire(canvas(), PROTOCOL._replace(kernel=Kernel("K", 0.2, 0.0, 1.0)), rng())
    assert (hu == 40).all()


def test_shoulders_are_noisier() -> None:
    protocol = PROTOCOL._replace(noise_hu=20.0, num_slices=40, bottom_mm=-60.0)
    drawn = Canvas(scan_grid(protocol, PERSON, 64))
    drawn.hu[:] = 0.0
    hu = acquire(drawn, protocol, rng())
    assert hu[-5:].std() > 1.2 * hu[:5].std()


@pytest.mark.parametrize("intercept", [-1024, -8192])
def test_outside_of_a_round_field_of_view_lies_the_intercept(intercept) -> None:
    hu = acquire(canvas(), PROTOCOL._replace(circle=True, intercept=intercept), rng())
    padded = (hu == intercept).mean()
    assert padded == pytest.approx(1 - np.pi / 4, abs=0.02)
    assert (hu[:, 32, 32] == 40).all()


def test_the_table_lies_below_the_back_and_in_air_only() -> None:
    drawn = canvas(hu=-1000.0)
    drawn.hu[:, :40] = 55.0
    before = drawn.hu.copy()
    draw_table(drawn, PERSON, PROTOCOL.table_curve_mm)
    changed = drawn.hu != before
    assert changed.any()
    assert (before[changed] == -1000).all()
    rows = np.nonzero(changed)[1]
    assert drawn.grid.axis_mm[rows].min() > 60
    assert set(np.unique(drawn.hu[changed])) == {-930.0, -60.0}


def test_a_table_below_the_field_of_view_is_no_error() -> None:
    drawn = canvas(matrix=10, hu=-1000.0)
    draw_table(drawn, PERSON, PROTOCOL.table_curve_mm)
    assert (drawn.hu == -1000).all()


def test_protocols_stay_in_their_ranges_and_hold_the_chest() -> None:
    for scan in roster(60, seed=3):
        person = draw_person(scan, {}, 0.3)
        protocol = draw_protocol(scan, person, SITES["a"], 128, None)
        assert 1.0 <= protocol.slice_mm <= 5.0
        assert 290 <= protocol.pixel_mm * 128 <= 500.1
        assert protocol.intercept in (-1024, -8192)
        top = protocol.bottom_mm + protocol.slice_mm * (protocol.num_slices - 1)
        scale = person.pose.scale[2]
        assert protocol.bottom_mm < -180 * scale
        assert top > 108 * scale


def test_spacing_of_the_command_line_wins() -> None:
    scan = roster(1, seed=3)[0]
    protocol = draw_protocol(scan, draw_person(scan, {}, 0.3), SITES["a"], 64, (3.5, 3.5))
    assert protocol.slice_mm == 3.5


def test_three_quarters_of_the_raw_volumes_have_intercept_1024() -> None:
    scans = roster(300, seed=6)
    person = draw_person(scans[0], {}, 0.3)
    share = np.mean([draw_protocol(scan, person, SITES["a"], 64, None).intercept == -1024 for scan in scans])
    assert share == pytest.approx(0.74, abs=0.1)


def test_sites_differ_in_everything_that_a_scanner_can_differ_in() -> None:
    a, b = SITES["a"], SITES["b"]
    assert all(getattr(a, field) != getattr(b, field) for field in a._fields)
    assert not {kernel.name for kernel in a.kernels} & {kernel.name for kernel in b.kernels}
    assert all("SYNTHETIC" in site.manufacturer for site in SITES.values())
    codes = {
        draw_protocol(scan, draw_person(scan, {}, 0.3), b, 64, None).axcodes
        for scan in roster(30, 1, site="b")
    }
    assert codes == {"RAS", "LAS"}
