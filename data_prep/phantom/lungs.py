"""Draws what grows inside the lungs: a branching tree of vessels and the bronchi beside its stems.

A tree is grown once per patient in patient millimetres and stamped on whatever grid the scan has.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom.anatomy import IS_LUNG, Anatomy, lung_points
from data_prep.phantom.canvas import Canvas, Region

HILA = {"right": np.array([-42.0, 12.0, -22.0]), "left": np.array([46.0, 14.0, -22.0])}
VESSEL_HU, WALL_HU, LUMEN_HU = 45.0, -60.0, -985.0


class Tree(NamedTuple):
    """Branches of both lungs; arrays over branches.

    Attributes:
        start: (N, 3) patient mm, nearer to the hilum.
        control: (N, 3) control point of the branch's curve.
        end: (N, 3).
        radius_mm: (N,) of the vessel.
    """

    start: NDArray[np.float64]
    control: NDArray[np.float64]
    end: NDArray[np.float64]
    radius_mm: NDArray[np.float64]

    def points(
        self, step_mm: float, chosen: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
        """Points along the branches about ``step_mm`` apart, their radii, and the branch of each."""
        branches = np.arange(len(self.end)) if chosen is None else np.flatnonzero(chosen)
        length = np.linalg.norm(self.end[branches] - self.start[branches], axis=1)
        count = np.maximum(2, np.ceil(1.15 * length / step_mm).astype(np.intp))
        branch = np.repeat(branches, count)
        position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        t = (position / np.repeat(count - 1, count))[:, None]
        curve = (
            (1 - t) ** 2 * self.start[branch]
            + 2 * t * (1 - t) * self.control[branch]
            + t * t * self.end[branch]
        )
        return curve, self.radius_mm[branch], branch


def grow_tree(anatomy: Anatomy, num_tips: int = 900) -> Tree:
    """Grow the vessels of both lungs.

    Random points of the lung are joined, from the hilum outwards, to the nearest one that is already joined,
    with a penalty on detours; a branch is thicker the more tips it feeds (Murray's law, exponent 2.6).

    Args:
        anatomy: the patient.
        num_tips: points in both lungs together (our choice: the branches of about seven divisions).
    """
    rng = anatomy.rng(3)
    tips = lung_points(anatomy, rng, num_tips, max_cage_field=0.93)
    starts, ends, radii = [], [], []
    for side, sign in (("right", -1), ("left", 1)):
        hilum = HILA[side]
        on_side = tips[np.sign(tips[:, 0]) == sign]
        on_side = on_side[np.argsort(((on_side - hilum) ** 2).sum(axis=1))]
        nodes = np.concatenate([hilum[None], on_side])
        way = np.zeros(len(nodes))
        parent = np.zeros(len(nodes), dtype=np.intp)
        for number in range(1, len(nodes)):
            distance = np.sqrt(((nodes[:number] - nodes[number]) ** 2).sum(axis=1))
            parent[number] = np.argmin(distance + 0.55 * way[:number])
            way[number] = way[parent[number]] + distance[parent[number]]
        fed = np.ones(len(nodes))
        for number in range(len(nodes) - 1, 0, -1):
            fed[parent[number]] += fed[number]
        starts.append(nodes[parent[1:]])
        ends.append(nodes[1:])
        radii.append(np.minimum(0.62 * fed[1:] ** (1 / 2.6), 5.5))
    start, end = np.concatenate(starts), np.concatenate(ends)
    bend = 0.14 * np.linalg.norm(end - start, axis=1, keepdims=True) * rng.standard_normal(start.shape)
    return Tree(start, (start + end) / 2 + bend, end, np.concatenate(radii))


def draw_vessels(canvas: Canvas, anatomy: Anatomy, tree: Tree) -> None:
    """Draw the vessels into the lungs' tissue."""
    step = max(0.8, 0.55 * canvas.grid.voxel[2])
    points, radius, _ = tree.points(step)
    hu = VESSEL_HU + 0.5 * (anatomy.blood_hu[0] - 42)
    canvas.stamp(points, radius, hu, only_labels=IS_LUNG)


def airway_points(
    canvas: Canvas, anatomy: Anatomy, tree: Tree, min_radius_mm: float = 1.5
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centre points and inner radii of the bronchi: each runs beside a vessel of its own size.

    Args:
        canvas: the scan; its voxels say how dense the points must be.
        anatomy: the patient.
        tree: the vessels.
        min_radius_mm: thinner vessels have no visible bronchus.
    """
    points, radius, branch = tree.points(max(0.8, 0.5 * canvas.grid.voxel[2]), tree.radius_mm > min_radius_mm)
    direction = anatomy.rng(4).standard_normal((len(tree.end), 3))
    # Beside the branch: perpendicular to it.
    axis = tree.end - tree.start
    axis /= np.linalg.norm(axis, axis=1, keepdims=True) + 1e-9
    direction -= (direction * axis).sum(axis=1, keepdims=True) * axis
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) + 1e-9
    inner = np.clip(0.7 * radius, 0.9, 3.4)
    return points + direction[branch] * (radius + inner + 0.9)[:, None], inner


def draw_airways(canvas: Canvas, anatomy: Anatomy, tree: Tree, wall_mm: float = 0.9) -> Region:
    """Draw the bronchi of both lungs: a wall of ``wall_mm`` (our choice: 0.9, thin as in health), then air.

    Returns:
        The voxels that wall and lumen cover.
    """
    points, inner = airway_points(canvas, anatomy, tree)
    region = canvas.stamp(points, inner + wall_mm, WALL_HU, only_labels=IS_LUNG)
    canvas.stamp(points, inner, LUMEN_HU, only_labels=IS_LUNG)
    return region
