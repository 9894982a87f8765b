"""Draws abnormalities of the lung tissue and the airways; see :mod:`data_prep.phantom.findings`."""

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom.anatomy import IS_LUNG, back_distance, cage_field, lobe_name, lung_box
from data_prep.phantom.body import polyline
from data_prep.phantom.canvas import Region
from data_prep.phantom.grid import Box, Floats, Mask, Waves
from data_prep.phantom.lungs import HILA, LUMEN_HU, airway_points
from data_prep.phantom.scene import Finding, Scene

SOLID_HU = 35.0


def _blob(
    scene: Scene, rng: np.random.Generator, center: NDArray[np.floating], radius_mm: float, rough: float
) -> tuple[Box, Floats]:
    """Field of an ellipsoid with an uneven outline, below 1 inside."""
    axes = radius_mm * np.array([1.0, 0.9, 0.85]) * rng.uniform(0.8, 1.2, 3)
    box, field = scene.canvas.ellipsoid_field(center, axes, float(rng.uniform(-60, 60)), margin=1 + rough)
    return box, field + np.float32(1.6 * rough) * Waves(rng, 0.9 * radius_mm, 10).on(scene.canvas.grid, box)


def _mix(scene: Scene, box: Box, share: Floats, hu: float | Floats) -> Region:
    """Mix a material into the lungs by its share of each voxel; returns where it is at least half."""
    share = share * IS_LUNG[scene.canvas.labels[box]]
    place = scene.canvas.hu[box]
    place += share * (hu - place)
    return Region(box, share >= 0.5)


def draw_nodules(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """One to five nodules, solid, subsolid or calcified; or a shower of micronodules."""
    canvas = scene.canvas
    if rng.random() < 0.12:
        points = scene.points(rng, 40 + int(120 * severity))
        region = canvas.stamp(points, rng.uniform(1.3, 2.4, len(points)), 0.0, only_labels=IS_LUNG)
        return [Finding("Lung nodule", "1e", "Diffuse micronodules in both lungs.", "lung", region)]
    found = []
    for center in scene.points(rng, 1 + int(rng.poisson(0.7 + 0.8 * severity)), 0.8)[:5]:
        radius = 2.6 + 14 * severity**1.5 * rng.uniform(0.5, 1.0)
        hu = float(rng.choice([SOLID_HU, SOLID_HU, SOLID_HU, -350.0, 350.0]))
        shape = np.random.default_rng(rng.integers(2**62))
        if radius < 1.6 * canvas.grid.voxel[2]:
            region = canvas.stamp(center[None], radius, hu, only_labels=IS_LUNG)
        else:
            box, field = _blob(scene, shape, center, radius, 0.22)
            region = _mix(scene, box, np.clip((1 - field) * np.float32(radius / 4) + 0.5, 0, 1), hu)
        kind = {-350.0: "Subsolid nodule", 350.0: "Calcified nodule"}.get(hu, "Nodule")
        where = lobe_name(scene.anatomy, center)
        text = f"{kind} of {2 * radius:.0f} mm in the {where}."
        found.append(Finding("Lung nodule", "2d", text, where, region, 2 * radius))
    return found


def draw_emphysema(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Holes in the lung tissue, mostly in the upper lobes, and bullae below the pleura."""
    points = scene.points(rng, 250 + int(1500 * severity), 0.97)
    points = points[rng.random(len(points)) < np.clip((points[:, 2] + 90) / 120, 0.08, 1)]
    radius = rng.uniform(1.6, 3.2 + 2.6 * severity, len(points))
    edge = cage_field(*points.T.astype(np.float32)) > 0.72
    bullae = edge & (points[:, 2] > 0) & (rng.random(len(points)) < 0.15 * severity)
    radius[bullae] = rng.uniform(6, 8 + 12 * severity, int(bullae.sum()))
    region = scene.canvas.stamp(points, radius, -995.0, only_labels=IS_LUNG)
    text = "Centrilobular and paraseptal emphysema."
    return [Finding("Emphysema", "1c", text, "lung", region)]


def draw_atelectasis(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Plates across the lower lungs; or collapsed lung along the back, in front of any effusion."""
    if rng.random() < 0.5:
        return _dependent_atelectasis(scene, rng, severity)
    found = []
    centers = scene.points(rng, 60, 0.85)
    centers = centers[centers[:, 2] < -20][: 1 + int(2.5 * severity + rng.random())]
    for center in centers:
        reach, thick = 22 + 26 * severity, 1.5 + 2.5 * severity
        box, field = scene.canvas.ellipsoid_field(center, (reach, reach, 0.6 * reach))
        x, y, z = scene.canvas.grid.offsets(box, center)
        normal = rng.standard_normal(3) * np.array([0.5, 0.5, 1.0])
        nx, ny, nz = (normal / np.linalg.norm(normal)).astype(np.float32)
        bend = 3 * Waves(rng, 40.0, 6).on(scene.canvas.grid, box)
        off = np.abs(nx * x + ny * y + nz * z + bend)
        width = np.float32(0.5 * max(scene.canvas.grid.voxel))
        share = np.clip((thick - off) / width + 0.5, 0, 1) * (field < 1)
        region = _mix(scene, box, share.astype(np.float32), 10.0)
        where = lobe_name(scene.anatomy, center)
        found.append(Finding("Atelectasis", "2b", f"Plate-like atelectasis in the {where}.", where, region))
    return found


def _dependent_atelectasis(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    found = []
    sides = [("right", -1), ("left", 1)]
    for number in rng.permutation(2)[: 1 + int(rng.random() < 0.5)]:
        side, sign = sides[int(number)]
        box = lung_box(scene.canvas.grid, sign)
        x, y, z = scene.canvas.grid.offsets(box)
        depth = (7 + 22 * severity) * np.clip((-25 + 60 * severity - z) / 60, 0, 1)
        depth = depth * (1 + np.float32(0.25) * Waves(rng, 35.0, 8).on(scene.canvas.grid, box))
        fluid = np.float32(1.25 * scene.fluid.depth_mm[0 if sign < 0 else 1])
        off = back_distance(y, z) - fluid * np.clip((-125 + 2.4 * fluid - z) / 70, 0, 1) ** np.float32(0.6)
        share = np.clip((depth - off) / 4 + 0.5, 0, 1) * (x * sign > 0) * (depth > 1)
        region = _mix(scene, box, share.astype(np.float32), float(rng.uniform(-30, 40)))
        where = f"{side} lower lobe"
        found.append(Finding("Atelectasis", "2b", f"Dependent atelectasis in the {where}.", where, region))
    return found


def draw_consolidation(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Airless lung around the focus of the disease, the bronchi still holding air."""
    canvas = scene.canvas
    found = []
    others = scene.points(rng, 1 + int(1.6 * severity))[1:]
    for number, center in enumerate([scene.focus, *others]):
        radius = (16 + 32 * severity) * (1.0 if number == 0 else 0.6)
        box, field = _blob(scene, rng, center, radius, 0.3)
        region = _mix(scene, box, np.clip((1 - field) * 3 + 0.5, 0, 1), float(rng.uniform(20, 60)))
        where = lobe_name(scene.anatomy, center)
        found.append(Finding("Consolidation", "2b", f"Consolidation in the {where}.", where, region))
        points, inner = airway_points(canvas, scene.anatomy, scene.tree)
        near = ((points - center) ** 2).sum(axis=1) < (0.85 * radius) ** 2
        canvas.stamp(points[near], 0.8 * inner[near], -850.0, only_labels=IS_LUNG)
    return found


def draw_opacity(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Patches of ground glass: denser lung, its vessels still visible. The first lies around the focus."""
    found = []
    others = scene.points(rng, 1 + int(rng.poisson(0.6 + 2 * severity)))[1:]
    for center in (scene.focus, *others):
        radius = 20 + 30 * severity * float(rng.uniform(0.5, 1))
        box, field = _blob(scene, rng, center, radius, 0.35)
        region = _mix(
            scene, box, np.clip((1 - field) * 1.5 + 0.2, 0, 1) * np.float32(0.22 + 0.35 * severity), 40.0
        )
        dense = np.clip((1 - field) * 1.5 + 0.2, 0, 1) >= 0.5
        region = scene.lung(Region(box, dense))
        where = lobe_name(scene.anatomy, center)
        found.append(Finding("Lung opacity", "2c", f"Ground-glass opacity in the {where}.", where, region))
    return found


def draw_fibrosis(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Scars: bands that meet, mostly in the upper lobes; sometimes a honeycomb below the pleura."""
    if rng.random() < 0.2:
        return _honeycomb(scene, rng, severity)
    found = []
    seeds = scene.points(rng, 40, 0.95)
    seeds = seeds[np.argsort(-seeds[:, 2] + rng.uniform(0, 120, len(seeds)))]
    for center in seeds[: 1 + int(rng.random() < 0.4 + 0.4 * severity)]:
        lines = []
        for _ in range(4 + int(6 * severity)):
            way = rng.standard_normal(3)
            way *= rng.uniform(14, 24 + 26 * severity) / np.linalg.norm(way)
            bent = center + np.linspace(0, 1, 5)[:, None] * way + rng.uniform(-3, 3, (5, 3))
            lines.append(polyline(bent, 0.8))
        points = np.concatenate(lines)
        region = scene.canvas.stamp(points, 1.0 + 1.3 * severity, 20.0, only_labels=IS_LUNG)
        where = lobe_name(scene.anatomy, center)
        text = f"Fibrotic bands in the {where}."
        found.append(Finding("Pulmonary fibrotic sequela", "2a", text, where, region))
    return found


def _lungs(scene: Scene) -> tuple[Box, Mask]:
    box = lung_box(scene.canvas.grid)
    return box, IS_LUNG[scene.canvas.labels[box]]


def _honeycomb(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    box, lung = _lungs(scene)
    x, y, z = scene.canvas.grid.offsets(box)
    edge = cage_field(x, y, z) > np.float32(0.82 - 0.25 * severity)
    affected = lung & edge & (z < -20 + 30 * np.float32(severity)) & (y > -40)
    wave = 2 * np.pi / max(9.0, 4 * max(scene.canvas.grid.voxel[1:]))
    cysts = np.cos(wave * x) * np.cos(wave * y) + 0.25 * Waves(rng, 14.0, 8).on(scene.canvas.grid, box)
    region = scene.canvas.paint(Region(box, affected), hu=np.where(np.abs(cysts) > 0.32, -930.0, -120.0))
    text = "Subpleural honeycombing of both bases."
    return [Finding("Pulmonary fibrotic sequela", "2f", text, "lung", region)]


def draw_mosaic(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Lobules of denser lung between lobules of normal density."""
    box, lung = _lungs(scene)
    field = Waves(rng, 42.0, 14).on(scene.canvas.grid, box)
    share = np.clip((field - np.float32(0.1)) * 5, 0, 1) * lung
    scene.canvas.hu[box] += share * np.float32(60 + 120 * severity)
    region = Region(box, share >= 0.5)
    return [Finding("Mosaic attenuation pattern", "1f", "Mosaic attenuation of both lungs.", "lung", region)]


def draw_peribronchial(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Thick walls of the bronchi."""
    points, inner = airway_points(scene.canvas, scene.anatomy, scene.tree, 1.4)
    wall = 1.5 + 1.3 * severity
    region = scene.canvas.stamp(points, inner + wall, float(rng.uniform(-20, 40)), only_labels=IS_LUNG)
    lumen = scene.canvas.stamp(points, inner, LUMEN_HU, only_labels=IS_LUNG)
    region = _without(region, lumen)
    return [Finding("Peribronchial thickening", "1a", "Thickened bronchial walls.", "lung", region)]


def _without(region: Region, hole: Region) -> Region:
    """A region less another one that lies inside its box."""
    mask = region.mask.copy()
    inner = tuple(
        slice(h.start - r.start, h.stop - r.start) for h, r in zip(hole.box, region.box, strict=True)
    )
    if hole.mask.size:
        mask[inner] &= ~hole.mask
    return Region(region.box, mask)


def draw_bronchiectasis(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """Wide bronchi with thick walls in one or two lobes, pointing away from the hilum."""
    found = []
    seeds = scene.points(rng, 30, 0.7)
    seeds = seeds[np.argsort(seeds[:, 2] + rng.uniform(0, 110, len(seeds)))]
    for seed in seeds[: 1 + int(rng.random() < 0.3 + 0.5 * severity)]:
        hilum = HILA["right" if seed[0] < 0 else "left"]
        lines, radii = [], []
        for _ in range(6 + int(12 * severity)):
            start = seed + rng.uniform(-24, 24, 3)
            way = (start - hilum) / (np.linalg.norm(start - hilum) + 1e-6) + 0.35 * rng.standard_normal(3)
            line = polyline(np.stack([start, start + way * rng.uniform(10, 24)]), 0.8)
            lines.append(line)
            radii.append(np.full(len(line), rng.uniform(2.0, 3.0 + 3.5 * severity)))
        points, inner = np.concatenate(lines), np.concatenate(radii)
        region = scene.canvas.stamp(points, inner + 1.6, 10.0, only_labels=IS_LUNG)
        scene.canvas.stamp(points, inner, LUMEN_HU, only_labels=IS_LUNG)
        where = lobe_name(scene.anatomy, seed)
        text = f"Bronchiectasis in the {where}."
        found.append(Finding("Bronchiectasis", "1b", text, where, region))
    return found


def draw_septal(scene: Scene, rng: np.random.Generator, severity: float) -> list[Finding]:
    """A net of thick septa between the lobules near the pleura."""
    box, lung = _lungs(scene)
    x, y, z = scene.canvas.grid.offsets(box)
    affected = lung & (cage_field(x, y, z) > np.float32(0.62 - 0.35 * severity)) & (z < 20 + 60 * severity)
    affected &= Waves(rng, 90.0, 8).on(scene.canvas.grid, box) > np.float32(0.2 - 1.2 * severity)
    warp = 6 * Waves(rng, 50.0, 8).on(scene.canvas.grid, box)
    cell = 2 * np.pi / max(19.0, 5 * scene.canvas.grid.voxel[2])
    net = np.full(warp.shape, np.inf, np.float32)
    for nx, ny, nz in ((1.0, 0.2, 0.3), (-0.45, 0.85, 0.3), (-0.5, -0.8, 0.45)):
        net = np.minimum(net, np.abs(np.sin(np.float32(0.5 * cell) * (nx * x + ny * y + nz * z + warp))))
    # Distance from the nearest septum in mm, to first order.
    off = net * np.float32(2 / cell)
    thick = np.float32(0.6 + 0.6 * severity)
    share = np.clip((thick - off) / np.float32(scene.canvas.grid.voxel[2]) + 0.5, 0, 1) * affected
    region = _mix(scene, box, share * np.float32(0.55 + 0.3 * severity), 20.0)
    region = Region(box, share >= 0.5)
    text = "Interlobular septal thickening."
    return [Finding("Interlobular septal thickening", "1d", text, "lung", region)]
