"""Voxel grid of a synthetic scan in patient coordinates, and random fields that are the same on every grid.

Arrays are ``(Z, Y, X)``: slices feet to head, rows to the back, columns to the patient's left (LPS).
Positions are in **patient millimetres**: origin in the middle of the chest at the level of the carina, x to
the left, y to the back, z to the head, for a patient of average size; the grid scales, turns and shifts them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]


class Pose(NamedTuple):
    """Where the patient lies in the scanner, and the patient's size.

    Attributes:
        shift_mm: scanner position (x, y) of the patient's origin.
        rotation_deg: rotation about the long axis.
        scale: (x, y, z) size relative to the average patient.
    """

    shift_mm: tuple[float, float]
    rotation_deg: float
    scale: tuple[float, float, float]


class Grid:
    """Voxel centres of one scan in patient millimetres.

    Args:
        num_slices: number of slices, feet to head.
        matrix: rows and columns of a slice.
        pixel_mm: in-plane spacing.
        slice_mm: distance between neighbouring slices.
        bottom_mm: scanner z of the lowest slice; the patient's origin lies at 0.
        pose: position and size of the patient.

    Raises:
        ValueError: if a count or a spacing is not positive.
    """

    def __init__(
        self, num_slices: int, matrix: int, pixel_mm: float, slice_mm: float, bottom_mm: float, pose: Pose
    ) -> None:
        if min(num_slices, matrix) < 1:
            raise ValueError(f"num_slices and matrix must be positive, got {num_slices} and {matrix}.")
        if not min(pixel_mm, slice_mm) > 0:
            raise ValueError(f"pixel_mm and slice_mm must be positive, got {pixel_mm} and {slice_mm}.")
        self.pose, self.pixel_mm = pose, pixel_mm
        self.shape = (num_slices, matrix, matrix)
        self.axis_mm = (np.arange(matrix, dtype=np.float32) - (matrix - 1) / 2) * np.float32(pixel_mm)
        angle = np.deg2rad(pose.rotation_deg)
        self.cos_sin = (float(np.cos(angle)), float(np.sin(angle)))
        cos, sin = self.cos_sin
        across, down = self.axis_mm[None, :] - pose.shift_mm[0], self.axis_mm[:, None] - pose.shift_mm[1]
        self.x: Floats = ((cos * across + sin * down) / pose.scale[0]).astype(np.float32)
        self.y: Floats = ((cos * down - sin * across) / pose.scale[1]).astype(np.float32)
        self.z: Floats = ((bottom_mm + slice_mm * np.arange(num_slices)) / pose.scale[2]).astype(np.float32)
        # Change of patient (x, y) from one column, and from one row, to the next.
        self.step_mm = (
            np.array([cos / pose.scale[0], -sin / pose.scale[1]], np.float32) * np.float32(pixel_mm),
            np.array([sin / pose.scale[0], cos / pose.scale[1]], np.float32) * np.float32(pixel_mm),
        )
        self.voxel = (slice_mm / pose.scale[2], pixel_mm / pose.scale[1], pixel_mm / pose.scale[0])

    def box(self, center: ArrayLike, half_size: ArrayLike) -> Box:
        """Voxel box around a patient box, (x, y, z) in patient mm; cut at the volume's edge, maybe empty."""
        (px, py, pz), (hx, hy, hz) = np.asarray(center, float), np.asarray(half_size, float)
        sx, sy, _ = self.pose.scale
        cos, sin = self.cos_sin
        middle = (cos * px * sx - sin * py * sy, sin * px * sx + cos * py * sy)
        half = (abs(cos) * hx * sx + abs(sin) * hy * sy, abs(sin) * hx * sx + abs(cos) * hy * sy)
        slices = [slice(*np.searchsorted(self.z, (pz - hz, pz + hz)))]
        for axis in (1, 0):
            at = middle[axis] + self.pose.shift_mm[axis]
            slices.append(slice(*np.searchsorted(self.axis_mm, (at - half[axis], at + half[axis]))))
        return slices[0], slices[1], slices[2]

    def offsets(self, box: Box, center: ArrayLike = (0.0, 0.0, 0.0)) -> tuple[Floats, Floats, Floats]:
        """Offsets (x, y, z) of a box's voxels from a point, shaped (1, Y, X), (1, Y, X) and (Z, 1, 1)."""
        x, y, z = (np.float32(value) for value in np.asarray(center, float))
        plane = box[1:]
        return self.x[plane][None] - x, self.y[plane][None] - y, self.z[box[0]][:, None, None] - z

    def voxels_of(self, points: NDArray[np.floating]) -> tuple[NDArray[np.intp], Mask]:
        """Nearest voxels (N, 3) in (z, y, x) of patient points (N, 3), and which lie in the volume."""
        sx, sy, _ = self.pose.scale
        cos, sin = self.cos_sin
        px, py = points[:, 0] * sx, points[:, 1] * sy
        across = cos * px - sin * py + self.pose.shift_mm[0]
        down = sin * px + cos * py + self.pose.shift_mm[1]
        rows, columns = (down - self.axis_mm[0]) / self.pixel_mm, (across - self.axis_mm[0]) / self.pixel_mm
        slices = (points[:, 2] - self.z[0]) / self.voxel[0]
        index = np.rint(np.stack([slices, rows, columns], axis=1)).astype(np.intp)
        return index, np.all((index >= 0) & (index < np.array(self.shape)), axis=1)


class Waves:
    """A smooth random field with mean about zero and unit variance: plane waves, the same on every grid.

    Args:
        rng: source of the wave vectors.
        wavelength_mm: middle wavelength; waves are drawn between 0.65 and 1.6 times it (our choice).
        num_waves: more waves make the field less regular (our choice: 20).
    """

    def __init__(self, rng: np.random.Generator, wavelength_mm: float, num_waves: int = 20) -> None:
        direction = rng.standard_normal((num_waves, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        length = wavelength_mm * np.exp(rng.uniform(np.log(0.65), np.log(1.6), num_waves))
        self.vectors = 2 * np.pi * direction / length[:, None]
        self.phase = rng.uniform(0, 2 * np.pi, num_waves)
        self.amplitude = np.sqrt(2 / num_waves)

    def at(self, points: NDArray[np.floating]) -> Floats:
        """Field at patient points (N, 3)."""
        return (self.amplitude * np.cos(points @ self.vectors.T + self.phase).sum(axis=1)).astype(np.float32)

    def on(self, grid: Grid, box: Box) -> Floats:
        """Field on a voxel box, as a product of waves along x and of waves along y and z."""
        (sx, sy, _), (cos, sin) = grid.pose.scale, grid.cos_sin
        kx, ky, kz = self.vectors[:, 0] / sx, self.vectors[:, 1] / sy, self.vectors[:, 2]
        across = grid.axis_mm[box[2]] - grid.pose.shift_mm[0]
        down = grid.axis_mm[box[1]] - grid.pose.shift_mm[1]
        wave_x = np.exp(1j * np.outer(kx * cos - ky * sin, across))
        wave_y = np.exp(1j * np.outer(down, kx * sin + ky * cos))
        wave_z = np.exp(1j * (np.outer(grid.z[box[0]], kz) + self.phase))
        wave_zy = (wave_z[:, None] * wave_y[None]).reshape(-1, len(self.phase))
        left = np.concatenate([wave_zy.real, wave_zy.imag], axis=1).astype(np.float32)
        right = np.concatenate([wave_x.real, -wave_x.imag], axis=0).astype(np.float32)
        field: Floats = (np.float32(self.amplitude) * (left @ right)).reshape(
            len(wave_z), len(wave_y), wave_x.shape[1]
        )
        return field
