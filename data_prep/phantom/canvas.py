"""A synthetic scan being drawn, and the few shapes that everything on it is made of.

Shapes are given in patient millimetres (:mod:`data_prep.phantom.grid`). Each is computed in its own bounding
box only, so the cost of a drawing follows the size of what is drawn.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_prep.phantom.grid import Box, Floats, Grid, Mask

# Cells of balls' neighbourhoods handled at once: bounds memory, changes no result.
STAMP_CHUNK_CELLS = 2_000_000


class Region(NamedTuple):
    """A drawn region: the voxel box it lies in and which of the box's voxels belong to it."""

    box: Box
    mask: Mask

    def num_voxels(self) -> int:
        """Voxels of the region."""
        return int(self.mask.sum())


class Canvas:
    """A scan being drawn: HU (float32) and TotalSegmentator ids (uint8) on one grid.

    Args:
        grid: the voxel grid. The canvas starts as air with label 0.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.hu: Floats = np.full(grid.shape, -1000.0, dtype=np.float32)
        self.labels: NDArray[np.uint8] = np.zeros(grid.shape, dtype=np.uint8)

    def paint(self, region: Region, hu: ArrayLike | None = None, label: int | None = None) -> Region:
        """Set the region's HU (number or box-shaped array) and label; what is None stays."""
        if hu is not None:
            np.copyto(self.hu[region.box], np.asarray(hu, dtype=np.float32), where=region.mask)
        if label is not None:
            np.copyto(self.labels[region.box], np.uint8(label), where=region.mask)
        return region

    def ellipsoid_field(
        self,
        center: ArrayLike,
        semi_axes: ArrayLike,
        angle_deg: float = 0.0,
        lean: float = 0.0,
        margin: float = 1.0,
    ) -> tuple[Box, Floats]:
        """Squared distance from the centre in units of an ellipsoid's radius: below 1 is inside.

        Args:
            center: (x, y, z) in patient mm.
            semi_axes: (along, across, z) in mm; "along" is the x axis turned by ``angle_deg``.
            angle_deg: turn in the axial plane, from the patient's left to the back.
            lean: mm that z falls per mm along the first axis.
            margin: the box holds fields up to ``margin ** 2``.

        Shape:
            Box, and its field ``(Z, Y, X)``.
        """
        along, across, height = (float(value) for value in np.asarray(semi_axes, float))
        radius = margin * max(along, across)
        half = (margin * along, margin * across) if angle_deg == 0 else (radius, radius)
        box = self.grid.box(center, (*half, margin * (height + abs(lean) * along)))
        dx, dy, dz = self.grid.offsets(box, center)
        angle = np.deg2rad(angle_deg)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        first, second = cos * dx + sin * dy, cos * dy - sin * dx
        flat = np.square(first / np.float32(along)) + np.square(second / np.float32(across))
        lowered = dz + np.float32(lean) * first if lean else dz
        return box, flat + np.square(lowered / np.float32(height))

    def ellipsoid(
        self, center: ArrayLike, semi_axes: ArrayLike, angle_deg: float = 0.0, lean: float = 0.0
    ) -> Region:
        """Inside of an ellipsoid (arguments as in :meth:`ellipsoid_field`)."""
        box, field = self.ellipsoid_field(center, semi_axes, angle_deg, lean)
        return Region(box, field < 1)

    def column_field(
        self,
        z_mm: ArrayLike,
        x_mm: ArrayLike,
        y_mm: ArrayLike,
        radius_x_mm: ArrayLike,
        radius_y_mm: ArrayLike,
    ) -> tuple[Box, Floats]:
        """Squared distance from an upright tube's axis in units of its radius: below 1 is inside.

        Args:
            z_mm: ascending knots of the axis, patient mm; the tube ends at the first and the last.
            x_mm: centre at each knot, or one number.
            y_mm: centre at each knot, or one number.
            radius_x_mm: radius at each knot, or one number.
            radius_y_mm: radius at each knot, or one number.
        """
        knots = np.asarray(z_mm, float)
        values = [
            np.broadcast_to(np.asarray(v, float), knots.shape) for v in (x_mm, y_mm, radius_x_mm, radius_y_mm)
        ]
        x, y, rx, ry = values
        low = np.array([(x - rx).min(), (y - ry).min(), knots[0]])
        high = np.array([(x + rx).max(), (y + ry).max(), knots[-1]])
        box = self.grid.box((low + high) / 2, (high - low) / 2)
        dx, dy, dz = self.grid.offsets(box)
        cx, cy, crx, cry = (np.interp(dz, knots, v).astype(np.float32) for v in values)
        return box, ((dx - cx) / crx) ** 2 + ((dy - cy) / cry) ** 2

    def column(self, *knots: ArrayLike) -> Region:
        """Inside of an upright tube; the arguments are those of :meth:`column_field`."""
        box, field = self.column_field(*knots)
        return Region(box, field < 1)

    def stamp(
        self,
        points: NDArray[np.floating],
        radius_mm: ArrayLike,
        hu: float,
        only_labels: NDArray[np.bool_] | None = None,
        label: int | None = None,
    ) -> Region:
        """Draw balls with soft edges and partial volume: close together along a line they make a tube.

        Args:
            points: (N, 3) centres in patient mm.
            radius_mm: one radius, or (N,).
            hu: HU of the material.
            only_labels: (118,) booleans, labels that may be drawn on: balls centred elsewhere are left out,
                the others are cut at the border.
            label: label of the returned voxels.

        Returns:
            Voxels covered at least half as much as the most covered one.
        """
        radius = np.broadcast_to(np.asarray(radius_mm, np.float32), len(points))
        index, inside = self.grid.voxels_of(points)
        if only_labels is not None:
            inside &= only_labels[self.labels[tuple(np.where(inside[:, None], index, 0).T)]]
        points, radius, index = points[inside], radius[inside], index[inside]
        if len(points) == 0:
            return Region((slice(0, 0),) * 3, np.zeros((0, 0, 0), dtype=bool))
        reach = self._reach(radius)
        # With a margin as wide as the largest reach, no ball crosses the box's edge.
        margin = reach.max(axis=0)
        low = index.min(axis=0) - margin
        cover = np.zeros(tuple(index.max(axis=0) + margin + 1 - low), dtype=np.float32)
        classes, group = np.unique(reach @ np.array([1 << 24, 1 << 12, 1]), return_inverse=True)
        for number in range(len(classes)):
            members = np.flatnonzero(group == number)
            half = reach[members[0]]
            step = max(1, STAMP_CHUNK_CELLS // int(np.prod(2 * half + 1)))
            for start in range(0, len(members), step):
                chosen = members[start : start + step]
                self._cover_balls(
                    cover, index[chosen] - low, index[chosen], points[chosen], radius[chosen], half
                )
        first = np.maximum(low, 0)
        last = np.minimum(low + cover.shape, self.grid.shape)
        box = (slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2]))
        cut = first - low
        size = last - first
        cover = cover[cut[0] : cut[0] + size[0], cut[1] : cut[1] + size[1], cut[2] : cut[2] + size[2]]
        if only_labels is not None:
            cover = cover * only_labels[self.labels[box]]
        self._blend(box, cover, hu)
        region = Region(box, cover >= max(1e-6, 0.5 * min(1.0, float(cover.max(initial=0.0)))))
        return self.paint(region, label=label)

    def _blend(self, box: Box, cover: Floats, hu: float) -> None:
        touched = np.unravel_index(np.flatnonzero(cover > 0), cover.shape)
        part = cover[touched]
        place = self.hu[box]
        old = place[touched]
        place[touched] = old + part * (np.float32(hu) - old)

    def _reach(self, radius: Floats) -> NDArray[np.intp]:
        """Voxels (z, y, x) that a ball of each radius may touch on either side of its own voxel; (N, 3)."""
        voxel = np.array(self.grid.voxel, dtype=np.float32)
        soft = np.array([0.5 * voxel[0], 0.0, 0.0], np.float32) + 0.5 * voxel[2]
        return np.floor((radius[:, None] + soft) / voxel + 0.5).astype(np.intp)

    def _cover_balls(
        self,
        cover: Floats,
        place: NDArray[np.intp],
        index: NDArray[np.intp],
        points: NDArray[np.floating],
        radius: Floats,
        half: NDArray[np.intp],
    ) -> None:
        """Raise ``cover`` to the share of each voxel that balls of one reach class cover.

        Patient x and y are linear in row and column, so the distance from a ball's neighbours follows from
        the distance from its own voxel.
        """
        grid = self.grid
        z, y, x = index.T
        right, down = grid.step_mm
        rows, columns = np.arange(-half[1], half[1] + 1), np.arange(-half[2], half[2] + 1)
        row, column = (
            axis.reshape(-1).astype(np.float32) for axis in np.meshgrid(rows, columns, indexing="ij")
        )
        dx = (grid.x[y, x] - points[:, 0].astype(np.float32))[:, None] + (right[0] * column + down[0] * row)
        dy = (grid.y[y, x] - points[:, 1].astype(np.float32))[:, None] + (right[1] * column + down[1] * row)
        levels = np.arange(-half[0], half[0] + 1)
        dz = (grid.z[z] - points[:, 2].astype(np.float32))[:, None]
        dz = np.abs(dz + np.float32(grid.voxel[0]) * levels.astype(np.float32)) - np.float32(
            0.5 * grid.voxel[0]
        )
        np.maximum(dz, 0, out=dz)
        square = (dz * dz)[:, :, None] + (dx * dx + dy * dy)[:, None, :]
        width = np.float32(grid.voxel[2])
        near = np.flatnonzero(square < ((radius + 0.5 * width) ** 2)[:, None, None])
        ball, level_cell = np.divmod(near, square[0].size)
        level, cell = np.divmod(level_cell, square.shape[2])
        share = np.minimum((radius[ball] - np.sqrt(square.reshape(-1)[near])) / width + np.float32(0.5), 1)
        share *= np.minimum(1, np.pi * (radius / width) ** 2)[ball] ** np.float32(0.7)
        plane = cover.shape[1] * cover.shape[2]
        base = (place[:, 0] * plane + place[:, 1] * cover.shape[2] + place[:, 2])[ball]
        offset = (row * cover.shape[2] + column).astype(np.intp)[cell] + levels[level] * plane
        np.maximum.at(cover.reshape(-1), base + offset, share)
