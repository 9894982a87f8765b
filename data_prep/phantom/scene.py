"""What a drawer of abnormalities gets and returns.

Each drawer has a random generator of its own, so leaving one finding out changes no other, and a severity in
[0, 1] that sets size, number or contrast: findings range from hardly visible to gross.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.phantom.anatomy import IS_LUNG, Anatomy, back_distance, lung_points
from data_prep.phantom.canvas import Canvas, Region
from data_prep.phantom.grid import Floats, Mask
from data_prep.phantom.lungs import Tree


class Finding(NamedTuple):
    """One drawn abnormality.

    Attributes:
        label: CT-RATE label that it makes positive.
        code: ReXGroundingCT category, or "" where that dataset has none (heart, vessels, mediastinum).
        text: sentence for the report.
        location: lobe or organ.
        region: the changed voxels.
        size_mm: diameter of a nodule; else 0.
    """

    label: str
    code: str
    text: str
    location: str
    region: Region
    size_mm: float = 0.0


class Fluid(NamedTuple):
    """Pleural effusion: depth in mm on the right and on the left; 0 is none."""

    depth_mm: tuple[float, float]

    def contains(self, x: Floats, y: Floats, z: Floats) -> Mask:
        """Where the pleural space holds fluid: behind and below, the surface hollow like a crescent."""
        depth = np.where(x < 0, np.float32(self.depth_mm[0]), np.float32(self.depth_mm[1]))
        top = -125 + np.float32(2.4) * depth
        level = depth * np.clip((top - z) / 70, 0, 1) ** np.float32(0.6)
        hollow = 1 + np.float32(0.5) * ((np.abs(x) - 62) / 60) ** 2
        return (level > 0) & (back_distance(y, z) < level * hollow)


class Scene(NamedTuple):
    """What a drawer may use.

    Attributes:
        canvas: the scan.
        anatomy: the patient.
        tree: vessels of the lungs.
        fluid: pleural effusion of the scan; no lung is drawn inside it.
        focus: (x, y, z) around which acute disease gathers.
    """

    canvas: Canvas
    anatomy: Anatomy
    tree: Tree
    fluid: Fluid
    focus: NDArray[np.float64]

    def points(
        self, rng: np.random.Generator, num_points: int, max_cage_field: float = 0.9
    ) -> NDArray[np.float64]:
        """Random points (N, 3) in aerated lung, fewer than asked for where there is hardly any.

        Each is the first of four candidates that lies neither in fluid nor in another organ, so a candidate
        that the grids of two reconstructions judge differently moves only one point. The arguments are those
        of :func:`data_prep.phantom.anatomy.lung_points`.
        """
        points = lung_points(self.anatomy, rng, 4 * num_points, max_cage_field)
        index, inside = self.canvas.grid.voxels_of(points)
        z, y, x = np.where(inside[:, None], index, 0).T
        fits = (
            inside & IS_LUNG[self.canvas.labels[z, y, x]] & ~self.fluid.contains(*points.T.astype(np.float32))
        )
        groups = fits.reshape(num_points, 4)
        first = 4 * np.arange(num_points) + np.argmax(groups, axis=1)
        chosen: NDArray[np.float64] = points[first[groups.any(axis=1)]]
        return chosen

    def lung(self, region: Region) -> Region:
        """The part of a region that lies in the lungs."""
        return Region(region.box, region.mask & IS_LUNG[self.canvas.labels[region.box]])


Drawer = Callable[[Scene, np.random.Generator, float], list[Finding]]
"""Draws one label's findings, of a severity; the list is empty if none lies inside the scanned volume."""
