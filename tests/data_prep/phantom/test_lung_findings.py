"""Findings of the lung tissue look like what they are called and stay in the lungs."""

import numpy as np
import pytest

from data_prep.phantom import scan
from data_prep.phantom.anatomy import IS_LUNG, Anatomy, cage_field
from data_prep.phantom.body import draw_body
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Grid
from data_prep.phantom.lung_findings import (
    draw_atelectasis,
    draw_bronchiectasis,
    draw_consolidation,
    draw_emphysema,
    draw_fibrosis,
    draw_mosaic,
    draw_nodules,
    draw_opacity,
    draw_peribronchial,
    draw_septal,
)
from data_prep.phantom.lungs import draw_vessels, grow_tree
from data_prep.phantom.scene import Drawer, Finding, Fluid, Scene
from tests.data_prep.phantom.conftest import UPRIGHT

FOCUS = np.array([-70.0, 20.0, -30.0])
DRAWERS = [
    drawer for drawer in scan.DRAWERS.values() if drawer.__module__ == "data_prep.phantom.lung_findings"
]
SEEDS = range(3)


@pytest.fixture(scope="module")
def lungs() -> Scene:
    anatomy = Anatomy()
    canvas = Canvas(Grid(60, 88, 3.8, 5.0, -190.0, UPRIGHT))
    draw_body(canvas, anatomy)
    tree = grow_tree(anatomy, 250)
    draw_vessels(canvas, anatomy, tree)
    return Scene(canvas, anatomy, tree, Fluid((0.0, 0.0)), FOCUS)


def copy_of(lungs: Scene) -> Scene:
    canvas = Canvas(lungs.canvas.grid)
    canvas.hu, canvas.labels = lungs.canvas.hu.copy(), lungs.canvas.labels.copy()
    return lungs._replace(canvas=canvas)


def draw(lungs: Scene, drawer: Drawer, severity: float, seed: int = 0) -> tuple[Scene, list[Finding]]:
    drawn = copy_of(lungs)
    return drawn, drawer(drawn, np.random.default_rng(seed), severity)


def union(of: Scene, found: list[Finding]) -> np.ndarray:
    mask = np.zeros(of.canvas.hu.shape, bool)
    for finding in found:
        mask[finding.region.box] |= finding.region.mask
    return mask


@pytest.mark.parametrize("drawer", DRAWERS)
def test_findings_stay_in_the_lungs_and_keep_the_labels(lungs, drawer) -> None:
    for seed in SEEDS:
        drawn, found = draw(lungs, drawer, 0.8, seed)
        mask = union(drawn, found)
        assert mask.any()
        assert IS_LUNG[drawn.canvas.labels[mask]].all()
        outside = ~IS_LUNG[lungs.canvas.labels]
        np.testing.assert_array_equal(drawn.canvas.hu[outside], lungs.canvas.hu[outside])
        np.testing.assert_array_equal(drawn.canvas.labels, lungs.canvas.labels)


@pytest.mark.parametrize("drawer", DRAWERS)
def test_severity_makes_a_finding_more_conspicuous(lungs, drawer) -> None:
    def change(severity: float) -> float:
        drawn = [draw(lungs, drawer, severity, seed)[0] for seed in SEEDS]
        return float(np.mean([np.abs(d.canvas.hu - lungs.canvas.hu).sum() for d in drawn]))

    assert change(1.0) > 1.25 * change(0.1) > 0


@pytest.mark.parametrize(
    ("drawer", "low", "high"),
    [
        (draw_nodules, -700, 500),
        (draw_consolidation, -50, 80),
        (draw_atelectasis, -450, 60),
        (draw_opacity, -750, -250),
        (draw_mosaic, -820, -600),
        (draw_emphysema, -995, -900),
        (draw_septal, -800, -150),
    ],
)
def test_findings_have_their_density(lungs, drawer, low, high) -> None:
    for seed in SEEDS:
        drawn, found = draw(lungs, drawer, 0.7, seed)
        assert low < np.median(drawn.canvas.hu[union(drawn, found)]) < high


def test_vessels_stay_visible_in_ground_glass_and_not_in_consolidation(lungs) -> None:
    vessels = lungs.canvas.hu > -300
    contrast = []
    for drawer in (draw_opacity, draw_consolidation):
        drawn, found = draw(lungs, drawer, 0.8)
        mask = union(drawn, found[:1]) & IS_LUNG[lungs.canvas.labels]
        tissue = drawn.canvas.hu[mask & ~vessels].mean()
        contrast.append(drawn.canvas.hu[mask & vessels].mean() - tissue)
    assert contrast[0] > 150
    assert contrast[1] < 100


def test_acute_disease_gathers_around_the_focus(lungs) -> None:
    for drawer in (draw_opacity, draw_consolidation):
        _, found = draw(lungs, drawer, 0.4)
        assert found[0].location == "right lower lobe"
    first, second = (union(*draw(lungs, drawer, 0.6)) for drawer in (draw_opacity, draw_consolidation))
    assert (first & second).any()


def test_nodules_have_their_diameter(lungs) -> None:
    voxel = float(np.prod(lungs.canvas.grid.voxel))
    ratios = []
    for seed in range(12):
        drawn, found = draw(lungs, draw_nodules, 1.0, seed)
        for finding in found:
            if finding.code == "2d" and finding.size_mm > 18:
                ratios.append(finding.region.num_voxels() * voxel / (np.pi / 6 * finding.size_mm**3))
    assert len(ratios) >= 5
    assert 0.4 < np.median(ratios) < 1.4


def test_nodules_also_come_as_a_shower_of_micronodules(lungs) -> None:
    codes = [draw(lungs, draw_nodules, 0.5, seed)[1][0].code for seed in range(40)]
    assert codes.count("1e") >= 1
    assert codes.count("2d") > 25


def test_emphysema_prefers_the_upper_lungs(lungs) -> None:
    drawn, found = draw(lungs, draw_emphysema, 0.7)
    mask, upper = union(drawn, found), lungs.canvas.grid.z > 0
    lung = IS_LUNG[lungs.canvas.labels]
    assert mask[upper].sum() / lung[upper].sum() > 1.3 * mask[~upper].sum() / lung[~upper].sum()


def test_septa_thicken_near_the_pleura(lungs) -> None:
    drawn, found = draw(lungs, draw_septal, 0.5)
    box, mask = found[0].region
    field = np.broadcast_to(cage_field(*drawn.canvas.grid.offsets(box)), mask.shape)
    assert field[mask].min() > 0.4


def test_fibrosis_is_bands_or_honeycomb(lungs) -> None:
    codes = {draw(lungs, draw_fibrosis, 0.6, seed)[1][0].code for seed in range(20)}
    assert codes == {"2a", "2f"}


def test_atelectasis_is_plates_or_lies_at_the_back(lungs) -> None:
    texts = {draw(lungs, draw_atelectasis, 0.6, seed)[1][0].text.split()[0] for seed in range(10)}
    assert texts == {"Plate-like", "Dependent"}


@pytest.mark.parametrize("drawer", [draw_bronchiectasis, draw_peribronchial])
def test_thick_bronchi_are_walls_around_air(lungs, drawer) -> None:
    drawn, found = draw(lungs, drawer, 0.9)
    change = drawn.canvas.hu - lungs.canvas.hu
    assert change.max() > 200
    assert (change[union(drawn, found)] > 100).mean() > 0.3
    assert found[0].code == {draw_bronchiectasis: "1b", draw_peribronchial: "1a"}[drawer]
