"""Draws abnormalities of heart, vessels, mediastinum and pleura into a synthetic chest, and says where.

Findings of the lung tissue are in :mod:`data_prep.phantom.lung_findings`; the list of all, in the order of
drawing, is in :mod:`data_prep.phantom.scan`. Sizes and HU are rounded from textbook ranges (our choice).
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom.anatomy import (
    HEART_ANGLE_DEG,
    HEART_LEAN,
    IS_LUNG,
    TS_IDS,
    Anatomy,
    cage_field,
    lung_box,
)
from data_prep.phantom.body import draw_tube, polyline
from data_prep.phantom.canvas import Region
from data_prep.phantom.organs import AIR_HU, AORTA_DOWN
from data_prep.phantom.scene import Finding, Fluid, Scene

METAL_HU, CALCIUM_HU = 2900.0, (450.0, 1300.0)


def draw_cardiomegaly(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """The heart was already drawn large (:class:`Anatomy`); say where it is larger than an average one."""
    del rng, severity
    anatomy = scene.anatomy
    box, field = scene.canvas.ellipsoid_field(
        anatomy.heart_center, anatomy.heart_axes, HEART_ANGLE_DEG, HEART_LEAN
    )
    average = Anatomy(dome_mm=anatomy.dome_mm).heart_field(*scene.canvas.grid.offsets(box))
    inside = scene.canvas.labels[box] == TS_IDS["heart"]
    region = Region(box, (field < 1) & (average > 1.2) & inside)
    return [Finding("Cardiomegaly", "", "The heart is enlarged.", "heart", region)]


def draw_pericardial_effusion(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Fluid around the heart, more below and behind."""
    canvas, anatomy = scene.canvas, scene.anatomy
    thickness = 5 + 17 * severity
    center = anatomy.heart_center + np.array([0.25, 0.3, -0.2]) * thickness
    axes = anatomy.heart_axes + thickness
    box, field = canvas.ellipsoid_field(center, axes, HEART_ANGLE_DEG, HEART_LEAN)
    x, y, z = canvas.grid.offsets(box)
    labels = canvas.labels[box]
    free = (labels == 0) | IS_LUNG[labels]
    free &= (cage_field(x, y, z) < 0.97) & (z < anatomy.heart_center[2] + 26) & (canvas.hu[box] < 35)
    free &= canvas.hu[box] > -930
    region = canvas.paint(Region(box, (field < 1) & free), hu=float(rng.uniform(4, 18)), label=0)
    return [Finding("Pericardial effusion", "", "Pericardial effusion.", "heart", region)]


def draw_pleural_effusion(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Fluid in the pleural space (depths from the scene)."""
    del severity
    canvas = scene.canvas
    found = []
    hu = float(rng.uniform(0, 22))
    for side, sign, depth in (("right", -1, scene.fluid.depth_mm[0]), ("left", 1, scene.fluid.depth_mm[1])):
        if depth > 0:
            box = lung_box(canvas.grid, sign)
            x, y, z = canvas.grid.offsets(box)
            fluid = scene.fluid.contains(x, y, z) & (x * sign > 0)
            region = scene.lung(Region(box, fluid))
            # The compressed lung in front of the fluid is denser.
            near = Fluid((1.25 * scene.fluid.depth_mm[0], 1.25 * scene.fluid.depth_mm[1])).contains(x, y, z)
            rim = scene.lung(Region(box, near & (x * sign > 0) & ~fluid))
            region = Region(box, region.mask | rim.mask)
            canvas.paint(rim, hu=float(rng.uniform(-150, -40)))
            canvas.paint(Region(box, region.mask & fluid), hu=hu, label=0)
            found.append(
                Finding("Pleural effusion", "2e", f"{side.capitalize()} pleural effusion.", side, region)
            )
    return found


def draw_hiatal_hernia(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Stomach behind the heart, with gas in front and fat or food behind."""
    canvas = scene.canvas
    size = 13 + 20 * severity
    center = np.array([9 + rng.uniform(-4, 4), 22.0, -98 + 0.4 * size])
    axes = (1.15 * size, 0.85 * size, 1.2 * size)
    box, field = canvas.ellipsoid_field(center, axes, float(rng.uniform(-25, 25)))
    labels = canvas.labels[box]
    free = (labels == 0) | IS_LUNG[labels] | (labels == TS_IDS["esophagus"])
    x, y, z = canvas.grid.offsets(box, center)
    hole = free & ((labels != 0) | (canvas.hu[box] < 0))
    region = canvas.paint(Region(box, (field < 1) & hole), hu=62.0, label=TS_IDS["stomach"])
    inside = region.mask & (field < 0.6)
    canvas.paint(Region(box, inside), hu=float(rng.choice([-85.0, 12.0])))
    canvas.paint(Region(box, inside & (y < float(rng.uniform(-0.3, 0.4)) * axes[1])), hu=AIR_HU + 25)
    return [Finding("Hiatal hernia", "", "Hiatal hernia.", "esophagus", region)]


# Nodal stations: centre in patient mm.
_STATIONS = {
    "right paratracheal": (-20, -2, 26),
    "prevascular": (12, -46, 28),
    "aortopulmonary": (24, -6, 2),
    "subcarinal": (2, 26, -22),
    "right hilar": (-42, 10, -30),
    "left hilar": (48, 12, -34),
    "left axillary": (140, 0, 72),
    "right axillary": (-140, 0, 72),
}
_FATTY_STATIONS = 2


def draw_lymphadenopathy(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Enlarged nodes in the fat of mediastinum, hila and armpits; they displace only fat and lung."""
    canvas = scene.canvas
    names = list(_STATIONS)
    count = 1 + int(round(4 * severity + rng.uniform(0, 2)))
    # Always one where the mediastinum has fat to displace.
    order = [int(rng.choice(_FATTY_STATIONS)), *(int(number) for number in rng.permutation(len(names)))]
    chosen = [names[number] for number in dict.fromkeys(order)][:count]
    found = []
    hu = 42.0 + 0.15 * (scene.anatomy.blood_hu[2] - 42)
    for name in chosen:
        center = np.array(_STATIONS[name], float) + rng.uniform(-5, 5, 3)
        axes = (7.5 + 10 * severity) * rng.uniform(0.75, 1.3, 3)
        box, field = canvas.ellipsoid_field(center, axes, float(rng.uniform(-60, 60)))
        labels = canvas.labels[box]
        free = ((labels == 0) | IS_LUNG[labels]) & (canvas.hu[box] < 0)
        region = canvas.paint(Region(box, (field < 1) & free), hu=hu, label=0)
        found.append(Finding("Lymphadenopathy", "", f"Enlarged {name} lymph node.", "mediastinum", region))
    return found


def draw_arterial_calcification(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Plaques on the wall of the aorta."""
    canvas = scene.canvas
    found = []
    for _ in range(2 + int(16 * severity)):
        z = rng.uniform(-200, 0)
        middle = [float(np.interp(z, AORTA_DOWN["z"], AORTA_DOWN[key])) for key in ("x", "y", "radius")]
        turn = rng.uniform(0, 2 * np.pi) + np.linspace(-1, 1, 12) * rng.uniform(0.1, 0.7)
        wall = np.stack([middle[0] + middle[2] * np.cos(turn), middle[1] + middle[2] * np.sin(turn)], axis=1)
        points = np.column_stack([wall, z + np.linspace(0, 1, 12) * rng.uniform(-8, 8)])
        if rng.random() < 0.5:
            points = _on_arch(rng)
        radius, hu = rng.uniform(1.0, 1.6 + 1.4 * severity), rng.uniform(*CALCIUM_HU)
        region = canvas.stamp(points, radius, hu)
        text = "Calcified plaque in the wall of the aorta."
        found.append(Finding("Arterial wall calcification", "", text, "aorta", region))
    return found


def _on_arch(rng: np.random.Generator) -> NDArray[np.float64]:
    """Points (12, 3) along a short stretch of the arch's outer wall."""
    angle = rng.uniform(0.2, np.pi - 0.2) + np.linspace(-1, 1, 12) * rng.uniform(0.04, 0.2)
    side = rng.uniform(-0.7, 0.7)
    reach, radius = 39.5, 13.0
    outer = reach + radius * np.cos(side)
    along, up, aside = outer * np.cos(angle), outer * np.sin(angle) / 1.25, radius * np.sin(side)
    ux, uy = 0.507, 0.862
    return np.column_stack([12 - along * ux - aside * uy, 6 - along * uy + aside * ux, 1 + up])


def draw_coronary_calcification(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Plaques in the grooves of the heart where the coronary arteries run."""
    canvas, anatomy = scene.canvas, scene.anatomy
    angle = np.deg2rad(HEART_ANGLE_DEG)
    found = []
    for _ in range(1 + int(9 * severity)):
        vessel = int(rng.choice(3, p=[0.55, 0.2, 0.25]))
        at = rng.uniform(0.05, 0.85) + np.linspace(0, 1, 16) * rng.uniform(0.03, 0.10 + 0.25 * severity)
        if vessel == 0:
            along, across, up = (
                -0.1 + 0.85 * at,
                np.full(16, -0.14),
                np.sqrt(1 - (0.85 * at - 0.1) ** 2 + 1e-3),
            )
        else:
            turn = (0.15 + 0.75 * at) * np.pi * (1 if vessel == 1 else -1)
            along, across, up = np.full(16, -0.12), np.sin(turn), np.cos(turn)
        unit = np.stack([along, across, up], axis=1)
        unit *= 0.95 / np.linalg.norm(unit, axis=1, keepdims=True)
        first, second, third = (unit * anatomy.heart_axes).T
        points = anatomy.heart_center + np.column_stack(
            [
                np.cos(angle) * first - np.sin(angle) * second,
                np.sin(angle) * first + np.cos(angle) * second,
                third - HEART_LEAN * first,
            ]
        )
        region = canvas.stamp(points, rng.uniform(1.1, 1.5 + 1.1 * severity), rng.uniform(*CALCIUM_HU))
        name = ("left anterior descending", "circumflex", "right coronary")[vessel]
        text = f"Calcification of the {name} artery."
        found.append(Finding("Coronary artery wall calcification", "", text, "heart", region))
    return found


def draw_medical_material(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """A pacemaker, a port, sternal wires or a gastric tube."""
    del severity
    canvas, anatomy = scene.canvas, scene.anatomy
    kind = str(rng.choice(["pacemaker", "port", "sternal wires", "gastric tube"]))
    front = -98 - 0.75 * anatomy.fat_mm
    apex = anatomy.heart_center + np.array([26.0, -18, -22])
    if kind == "pacemaker":
        parts = [canvas.paint(canvas.ellipsoid((98, front + 32, 52), (24, 8, 22), 24.0), hu=METAL_HU)]
        lead = np.array([[90, front + 34, 68], [70, -40, 96], [22, -46, 72], [-27, -20, 44], [-28, -10, -20]])
        parts.append(draw_tube(canvas, np.concatenate([lead, apex[None]]), 1.5, METAL_HU))
    elif kind == "port":
        parts = [canvas.paint(canvas.ellipsoid((-92, front + 30, 50), (14, 7, 13), -22.0), hu=1900.0)]
        line = np.array(
            [[-88, front + 34, 58], [-60, -44, 100], [-34, -28, 80], [-27, -20, 44], [-29, -10, -12.0]]
        )
        parts.append(draw_tube(canvas, line, 1.5, 1100.0))
    elif kind == "sternal wires":
        turn = np.linspace(0, 2 * np.pi, 30)
        parts = []
        for z in np.linspace(-45, 62, 6) + rng.uniform(-3, 3, 6):
            y = float(np.interp(z, [-62, -45, 30, 44, 52, 76], [-97, -96, -84, -80, -76, -66]))
            wire = np.column_stack([19 * np.cos(turn), y + 9 * np.sin(turn), np.full(30, z)])
            parts.append(canvas.stamp(polyline(wire, 1.0), 1.2, METAL_HU))
    else:
        tube = np.array(
            [[0, 26, 130], [2, 33, 60], [4, 33, 0], [8, 30, -60], [12, 18, -124], [40, -10, -140.0]]
        )
        parts = [draw_tube(canvas, tube, 2.2, 700.0), draw_tube(canvas, tube, 1.0, -500.0)]
    text = f"{kind.capitalize()} in place."
    return [Finding("Medical material", "", text, kind, part) for part in parts]
