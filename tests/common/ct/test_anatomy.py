"""On a synthetic patient whose anatomy is known."""

import numpy as np
import pytest

from common.ct.anatomy import Anatomy, coarse_grid, find_anatomy, lung_at_the_edges, width_over_depth
from data_prep.phantom.anatomy import IS_LUNG
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render


@pytest.fixture(scope="module")
def chest() -> Volume:
    return render(roster(1, seed=8)[0], "a", 128, (4.0, 5.0), {})


def spacing_of(volume: Volume) -> tuple[float, float, float]:
    return volume.protocol.pixel_mm, volume.protocol.pixel_mm, volume.protocol.slice_mm


def anatomy_of(volume: Volume, part: tuple[slice, ...]) -> Anatomy:
    anatomy = find_anatomy(coarse_grid(volume.hu[part].clip(-1024, 3071), spacing_of(volume)))
    assert anatomy is not None
    return anatomy


def test_lungs_are_as_large_as_they_were_drawn_also_where_the_image_cuts_them(chest: Volume) -> None:
    x, y, z = spacing_of(chest)
    for edge in (0, 50):
        hu, ts = (array[:, :, edge:] for array in (chest.hu, chest.ts))
        grid = coarse_grid(np.ascontiguousarray(hu).clip(-1024, 3071), (x, y, z))
        anatomy = find_anatomy(grid)
        drawn = IS_LUNG[ts].sum() * x * y * z / 1e6
        assert anatomy.lungs.sum() * grid.litres == pytest.approx(drawn, rel=0.2)
    assert hu[:, :, 0][IS_LUNG[ts[:, :, 0]]].size > 100  # the second image does cut them


def test_a_cut_through_both_lungs_is_seen_at_the_edge(chest: Volume) -> None:
    middle = chest.hu.shape[1] // 2
    assert lung_at_the_edges(anatomy_of(chest, np.s_[:, :, :])) == 0
    for half in (np.s_[:, :middle], np.s_[:, middle:]):
        assert lung_at_the_edges(anatomy_of(chest, half)) > 0.3


def test_a_body_is_as_wide_and_deep_as_its_box() -> None:
    hu = np.full((30, 40, 50), -1000, np.int16)
    hu[:, 10:30, 5:35] = 40
    anatomy = find_anatomy(coarse_grid(hu, (4.0, 3.0, 5.0)))
    assert anatomy.box == (10, 29, 5, 34)
    assert width_over_depth(anatomy) == pytest.approx(30 * 4 / (20 * 3))
    assert not anatomy.lungs.any()
    assert find_anatomy(coarse_grid(np.full_like(hu, -1000), (4.0, 3.0, 5.0))) is None


def test_bone_of_the_arms_is_no_spine() -> None:
    """Arms lie beside the body for the whole scan; vertebrae leave gaps."""
    hu = np.full((60, 80, 120), -1000, np.int16)
    hu[:, 20:60, 10:110] = 40
    hu[:, 36:46, 14:24] = hu[:, 36:46, 96:106] = 800
    hu[::2, 46:56, 55:65] = 800
    anatomy = find_anatomy(coarse_grid(hu, (4.0, 4.0, 5.0)))
    row, column = anatomy.spine
    assert 46 <= row <= 56
    assert 55 <= column <= 65
