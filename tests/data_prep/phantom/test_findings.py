"""Findings of heart, vessels, mediastinum and pleura look like what they are called."""

from functools import cache

import numpy as np
import pytest

from data_prep.phantom.anatomy import IS_LUNG, TS_IDS, Anatomy
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.findings import (
    draw_arterial_calcification,
    draw_cardiomegaly,
    draw_coronary_calcification,
    draw_hiatal_hernia,
    draw_lymphadenopathy,
    draw_medical_material,
    draw_pericardial_effusion,
    draw_pleural_effusion,
)
from data_prep.phantom.grid import Grid
from data_prep.phantom.lungs import grow_tree
from data_prep.phantom.scene import Finding, Fluid, Scene
from tests.data_prep.phantom.conftest import UPRIGHT, draw_inside


@cache
def healthy(anatomy: Anatomy) -> Canvas:
    return draw_inside(Grid(64, 88, 4.6, 5.0, -195.0, UPRIGHT), anatomy)


def scene(anatomy: Anatomy | None = None, fluid: Fluid | None = None) -> Scene:
    patient = anatomy or Anatomy()
    drawn = healthy(patient)
    canvas = Canvas(drawn.grid)
    canvas.hu, canvas.labels = drawn.hu.copy(), drawn.labels.copy()
    focus = np.array([-70.0, 30.0, -30.0])
    return Scene(canvas, patient, grow_tree(patient, 20), fluid or Fluid((0.0, 0.0)), focus)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def values(of: Scene, finding: Finding) -> np.ndarray:
    return of.canvas.hu[finding.region.box][finding.region.mask]


def size(found: list[Finding]) -> int:
    return sum(finding.region.num_voxels() for finding in found)


def center(of: Scene, finding: Finding) -> np.ndarray:
    box, grid = finding.region.box, of.canvas.grid
    z, y, x = np.nonzero(finding.region.mask)
    return np.array([grid.x[box[1:]][y, x].mean(), grid.y[box[1:]][y, x].mean(), grid.z[box[0]][z].mean()])


@pytest.mark.parametrize(
    "draw",
    [
        draw_pericardial_effusion,
        draw_hiatal_hernia,
        draw_lymphadenopathy,
        draw_arterial_calcification,
        draw_coronary_calcification,
    ],
)
def test_severity_makes_a_finding_larger(draw) -> None:
    mild, gross = (
        np.mean([size(draw(scene(), rng(s), severity)) for s in range(3)]) for severity in (0.1, 1.0)
    )
    assert gross > 1.5 * mild > 0


def test_cardiomegaly_marks_the_rim_by_which_the_heart_is_larger() -> None:
    large = scene(Anatomy(heart_scale=1.4))
    (finding,) = draw_cardiomegaly(large, rng(), 0.8)
    before = large.canvas.hu.copy()
    assert finding.region.num_voxels() > 500
    assert (large.canvas.labels[finding.region.box][finding.region.mask] == TS_IDS["heart"]).all()
    np.testing.assert_array_equal(large.canvas.hu, before)


def test_pericardial_effusion_is_water_around_the_heart() -> None:
    ill = scene()
    heart = ill.canvas.labels == TS_IDS["heart"]
    (finding,) = draw_pericardial_effusion(ill, rng(), 0.8)
    assert 0 < values(ill, finding).mean() < 25
    np.testing.assert_array_equal(ill.canvas.labels == TS_IDS["heart"], heart)
    assert not IS_LUNG[ill.canvas.labels[finding.region.box][finding.region.mask]].any()


def test_pleural_effusion_is_water_on_the_stated_side_and_takes_lung() -> None:
    ill = scene(fluid=Fluid((0.0, 45.0)))
    lung = IS_LUNG[ill.canvas.labels].sum()
    (finding,) = draw_pleural_effusion(ill, rng(), 0.8)
    assert (finding.code, finding.location) == ("2e", "left")
    assert center(ill, finding)[0] > 20
    hu = values(ill, finding)
    assert 0 <= np.median(hu) <= 22
    # The compressed lung around the fluid is denser, and still lung.
    assert hu.min() < -30
    assert IS_LUNG[ill.canvas.labels].sum() < 0.98 * lung


def test_no_fluid_no_effusion() -> None:
    assert draw_pleural_effusion(scene(), rng(), 0.8) == []


def test_hiatal_hernia_is_stomach_behind_the_heart_with_gas() -> None:
    ill = scene()
    (finding,) = draw_hiatal_hernia(ill, rng(), 0.8)
    assert (ill.canvas.labels[finding.region.box][finding.region.mask] == TS_IDS["stomach"]).all()
    assert center(ill, finding)[1] > ill.anatomy.heart_center[1]
    assert values(ill, finding).min() < -900
    assert values(ill, finding).max() > 0


def test_nodes_displace_fat_and_lung_only() -> None:
    ill = scene()
    before, labels = ill.canvas.hu.copy(), ill.canvas.labels.copy()
    found = draw_lymphadenopathy(ill, rng(), 0.9)
    assert len(found) >= 3
    changed = ill.canvas.hu != before
    assert (before[changed] < 0).all()
    assert (~changed | (labels == 0) | IS_LUNG[labels]).all()
    assert (ill.canvas.hu[changed] == 42).all()


@pytest.mark.parametrize(
    ("draw", "organ"),
    [(draw_arterial_calcification, "aorta"), (draw_coronary_calcification, "heart")],
)
def test_calcium_is_bright_and_at_its_organ(draw, organ) -> None:
    ill = scene()
    before = ill.canvas.hu.copy()
    reach = ill.canvas.labels == TS_IDS[organ]
    for _ in range(2):
        reach[:, 1:-1, 1:-1] |= (
            reach[:, :-2, 1:-1] | reach[:, 2:, 1:-1] | reach[:, 1:-1, :-2] | reach[:, 1:-1, 2:]
        )
    found = draw(ill, rng(), 0.9)
    marked = np.zeros(reach.shape, bool)
    for finding in found:
        marked[finding.region.box] |= finding.region.mask
    assert reach[marked].mean() > 0.7
    assert ill.canvas.hu[marked].max() > 400
    assert ill.canvas.hu[marked].mean() > before[marked].mean() + 150


def test_medical_material_comes_in_four_kinds_all_dense_and_a_pacemaker_lies_left_in_front() -> None:
    brightest = {}
    for seed in range(14):
        ill = scene()
        found = draw_medical_material(ill, rng(seed), 0.5)
        kind = found[0].location
        brightest[kind] = max(values(ill, finding).max() for finding in found if size([finding]))
        if kind == "pacemaker":
            x, y, _ = center(ill, found[0])
            assert x > 60
            assert y < -30
    assert set(brightest) == {"pacemaker", "port", "sternal wires", "gastric tube"}
    assert brightest["pacemaker"] > 2500
    assert min(brightest.values()) > 250
