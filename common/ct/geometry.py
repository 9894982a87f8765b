"""What every reader of CT files returns, whatever the format, and how stored values become it.

Shapes: X Y Z voxel axes as stored; Z H W canonical axes (slices, rows, columns).
"""

import math
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import numpy as np


class RejectedVolume(NamedTuple):
    """A volume that could not be read: the shard does without it and its index says why.

    Args:
        volume: name.
        reason: a few words that many volumes may share, to count by.
        detail: one line about this volume.
    """

    volume: str
    reason: str
    detail: str


EXCLUDED = "not a chest"
"""Reason of volumes that the dataset itself lists as no chest CT: left out, but no failure."""

NOT_AXIAL_CT = "not an axial CT"
"""Reason of DICOM series nobody meant to train on, such as scouts and reports: left out, but no failure."""


class RejectedError(ValueError):
    """A volume that must not reach a shard; caught in one place, counted and listed.

    Args:
        reason: a few words that many volumes may share, to count by.
        detail: one line about this volume.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = " ".join(detail.splitlines())  # names of files may hold ends of lines
        super().__init__(f"{reason}: {self.detail}")

    def of(self, volume: str) -> RejectedVolume:
        """Return the record of the rejection.

        Example:
            >>> RejectedError("unreadable", "the file ends early").of("train_1_a_1").reason
            'unreadable'
        """
        return RejectedVolume(volume, self.reason, self.detail)


def is_failure(rejected: RejectedVolume) -> bool:
    """Tell a volume that something is wrong with from one that was never meant to be used."""
    return rejected.reason not in (EXCLUDED, NOT_AXIAL_CT)


MAX_OBLIQUITY_DEG = 10.0

# Signs of the world axes x, y, z along which canonical indices grow: to the left, to the back, to the head.
_LPS_SIGNS = (-1, -1, 1)


def axial_slices(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Show a stored volume as axial slices, feet to head, the radiological way.

    Rows run from anterior to posterior, columns from the patient's right to the left. The affine alone
    decides, so one scan stored as RAS, LPS, LAS or (Z, Y, X) gives the same slices. CT and masks go through
    alike. Voxels are permuted and flipped, never resampled: the angle of an oblique scan stays in it.

    Args:
        volume: any dtype, axes as stored.
        affine: voxel to RAS+ world coordinates in mm.

    Shape:
        Input ``(X, Y, Z)`` and ``(4, 4)``. Output ``(Z, H, W)``, a view of ``volume``.

    Returns:
        The slices and their spacing in mm as (x, y, z): columns, rows, slices.

    Raises:
        ValueError: if the volume is not 3-D, or the affine is not a finite 4 x 4 matrix of perpendicular
            axes, or turned by more than 10 degrees from the world axes (our choice: a scan tilted by more is
            no longer axial).

    Example:
        >>> stored = np.arange(2 * 3 * 5).reshape(2, 3, 5)
        >>> slices, spacing_mm = axial_slices(stored, np.diag([-0.7, -0.8, 1.5, 1.0]))
        >>> slices.shape, spacing_mm
        ((5, 3, 2), (0.7, 0.8, 1.5))
        >>> bool((slices == stored.transpose(2, 1, 0)).all())
        True
    """
    if volume.ndim != 3:
        raise ValueError(f"volume must have 3 axes, got shape {volume.shape}.")
    axis_of_world, sign_of_world, spacing_mm = voxel_axes(affine)
    slices = volume.transpose([axis_of_world[world] for world in (2, 1, 0)])
    flips = [sign_of_world[world] != _LPS_SIGNS[world] for world in (2, 1, 0)]
    return slices[tuple(slice(None, None, -1 if flip else 1) for flip in flips)], spacing_mm


def voxel_axes(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float]]:
    """Find the voxel axis that runs along each world axis.

    Args:
        affine: ``(4, 4)`` voxel to RAS+ world coordinates in mm.

    Returns:
        For the world axes x, y, z: the voxel axis, the sign of its direction, and its spacing in mm.

    Raises:
        ValueError: as ``axial_slices``.

    Example:
        >>> voxel_axes(np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0, 1]]))
        ((2, 1, 0), (-1, -1, -1), (0.8, 0.8, 2.5))
    """
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"affine must be a finite 4 x 4 matrix, got {np.round(matrix, 3).tolist()}.")
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    cosines = matrix[:3, :3] / np.where(spacing, spacing, 1)
    # 1 for perpendicular axes, 0 for axes in a plane; two that share their closest world axis stay below 1/2.
    if abs(np.linalg.det(cosines)) < 0.5:
        raise ValueError(f"affine must have three perpendicular axes, got {np.round(matrix, 3).tolist()}.")
    closest = np.abs(cosines).argmax(axis=0)
    turned_deg = float(np.degrees(np.arccos(np.abs(cosines).max(axis=0).clip(max=1))).max())
    if turned_deg > MAX_OBLIQUITY_DEG:
        raise ValueError(
            f"affine must be within {MAX_OBLIQUITY_DEG:g} degrees of the world axes, got {turned_deg:.1f}. "
            "Resample the volume to axial slices first."
        )
    axes = tuple(int(axis) for axis in np.argsort(closest))
    signs = tuple(int(np.sign(cosines[world, axis])) for world, axis in enumerate(axes))
    x, y, z = (float(spacing[axis]) for axis in axes)
    return axes, signs, (x, y, z)


STORED_HU_RANGE = (-1024, 3071)
"""What shards keep, in HU: the 12 bits of a scanner without extended range; wider than every HU window."""

SHEAR_TOLERANCE_DEG = 0.5
"""How far axes may be from perpendicular. Our choice: headers round by less, gantries tilt by degrees."""

SPACING_TOLERANCE = 0.05
"""How far two statements of a spacing may differ. Our choice: headers round, another scan differs by more."""

SPACING_RANGE_MM = (0.1, 20.0)
"""Spacings a chest CT can have. Our choice: CT-RATE's metadata has 0.035 mm, no scanner has."""

MAX_EXTENT_MM = 2500
"""Of a whole body on its couch. Our choice: what is longer has its spacing in other units."""

MAX_VOXELS = 2**31
"""Voxels a CT can have: 4 GiB of HU. Our choice: 2,048 slices of 1024 x 1024, which no scanner exceeds."""


class StoredGrid(NamedTuple):
    """The voxel grid of a CT as it is stored.

    Args:
        shape: ``(X, Y, Z)`` of the stored array.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        axcodes: where the stored axes point, such as ``LPS``.
        has_origin: whether the affine says where in the world the grid lies. Nothing does so for CT-RATE's
            raw volumes; masks are then compared by shape and spacing alone.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    axcodes: str
    has_origin: bool = True


class HUValues:
    """What is kept of a volume's values before the clip: the extremes, and a sample to judge the unit by."""

    def __init__(self) -> None:
        self.lowest, self.highest = math.inf, -math.inf
        self.parts: list[np.ndarray] = []

    def add(self, hu: np.ndarray) -> bool:
        """Take in some values; tell whether all are finite.

        Args:
            hu: one or more planes, ``(X, Y)`` or ``(X, Y, N)``; about 64 x 64 values of each are kept.
        """
        lowest, highest = float(hu.min()), float(hu.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            return False
        self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
        steps = tuple(slice(None, None, max(1, side // 64)) for side in hu.shape[:2])
        self.parts.append(hu[steps].clip(-(2**20), 2**20).astype(np.float32).ravel())
        return True

    @property
    def sample(self) -> np.ndarray:
        """``(N,)`` float32 HU."""
        return np.concatenate(self.parts)


class StoredCT(NamedTuple):
    """A CT that was read whole.

    Args:
        hu: ``(Z, H, W)`` int16 canonical slices, rounded and clipped to ``STORED_HU_RANGE``.
        values: what the values were before the clip.
        spacing_mm: as (x, y, z): columns, rows, slices.
        grid: on which it is stored.
        sha256: of the file's bytes; of several files, of their digests in order.
    """

    hu: np.ndarray
    values: HUValues
    spacing_mm: tuple[float, float, float]
    grid: StoredGrid
    sha256: str


def store_hu(values: np.ndarray, slope: float, intercept: float, out: np.ndarray, seen: HUValues) -> bool:
    """Turn stored values into HU as shards keep them: rounded to whole HU, clipped, never wrapped.

    Args:
        values: of any integer or float type.
        slope: HU = slope * stored + intercept, computed in float64 or in whole numbers, which is the same.
        intercept: see ``slope``.
        out: int16 of the same shape, filled with HU in ``STORED_HU_RANGE``.
        seen: is told of the values before the clip.

    Returns:
        Whether all values are finite; if not, ``out`` means nothing.

    Example:
        >>> out, seen = np.empty((1, 3), np.int16), HUValues()
        >>> store_hu(np.array([[-200, 24, 32767]], np.int16), 10, -1024, out, seen), out.tolist()
        (True, [[-1024, -784, 3071]])
        >>> seen.lowest
        -3024.0
    """
    low, high = STORED_HU_RANGE
    if values.dtype.kind in "iu" and _fits_int32(values.dtype, slope, intercept):
        if values.dtype != np.int16 or (slope, intercept) != (1, 0):
            values = values.astype(np.int32)
            values *= int(slope)
            values += int(intercept)
        np.clip(values, low, high, out=out, casting="unsafe")
        return seen.add(values)
    hu = values * np.float64(slope) + intercept
    if not seen.add(hu):
        return False
    np.clip(np.rint(hu, out=hu), low, high, out=out, casting="unsafe")
    return True


def _fits_int32(dtype: np.dtype, slope: float, intercept: float) -> bool:
    """Tell whether whole numbers do, and every value and product of the rescale fits 32 bits."""
    if not (float(slope).is_integer() and float(intercept).is_integer()):
        return False
    products = [int(slope) * bound for bound in (np.iinfo(dtype).min, np.iinfo(dtype).max)]
    reached = [*products, *(product + int(intercept) for product in products), int(slope), int(intercept)]
    return max(map(abs, reached)) < 2**31


def canonical_hu(
    stored: np.ndarray, affine: np.ndarray, slope: float, intercept: float
) -> tuple[np.ndarray, tuple[float, float, float], HUValues]:
    """Turn a stored array into canonical slices in HU as shards keep them.

    Args:
        stored: array of the file.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.

    Shape:
        Input ``(X, Y, Z)``. Output ``(Z, H, W)``.

    Returns:
        int16 HU rounded and clipped to ``STORED_HU_RANGE``, the spacing in mm as (x, y, z), and what
        the values were before the clip.

    Raises:
        RejectedError: if a voxel is not finite, or the affine is not that of an axial scan.

    Example:
        >>> affine = np.diag([-0.7, -0.7, 2, 1])
        >>> hu, spacing_mm, seen = canonical_hu(np.full((2, 3, 5), 24), affine, 1, -1024)
        >>> hu.shape, int(hu[0, 0, 0]), seen.lowest
        ((5, 3, 2), -1000, -1000.0)
    """
    slices, spacing_mm = canonical_slices(stored, affine)
    hu = np.empty(slices.shape, np.int16)
    seen = HUValues()
    for z, plane in enumerate(slices):
        if not store_hu(plane, slope, intercept, hu[z], seen):
            raise RejectedError(
                "non-finite voxels", f"voxels must be finite, got NaN or infinity in slice {z}"
            )
    return hu, spacing_mm, seen


def canonical_slices(stored: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Do as ``axial_slices``, with an array or affine it refuses as a reason to reject the volume."""
    try:
        return axial_slices(stored, affine)
    except ValueError as error:
        raise RejectedError("geometry", str(error)) from error


def canonical_shape(grid: StoredGrid) -> tuple[int, int, int]:
    """Return the shape of the canonical slices of a grid.

    Raises:
        RejectedError: if the affine is not that of an axial scan, its size, spacing or extent not a CT's, or
            there are fewer than two slices.

    Example:
        >>> canonical_shape(StoredGrid((5, 4, 3), np.diag([-0.7, -0.7, 2, 1]), "LPS"))
        (3, 4, 5)
    """
    check_size(grid.shape)
    spacing_mm = tuple(np.linalg.norm(grid.affine[:3, :3], axis=0).tolist())
    check_spacing(spacing_mm)
    extent_mm = max(voxels * mm for voxels, mm in zip(grid.shape, spacing_mm, strict=True))
    if extent_mm > MAX_EXTENT_MM:
        what = f"{extent_mm:.0f} mm: shape {grid.shape} with spacing {shown_mm(spacing_mm)}"
        raise RejectedError("spacing", f"a CT must be at most {MAX_EXTENT_MM} mm long, got {what}")
    (x, y, z), _, _ = perpendicular_axes(grid.affine)
    shape = grid.shape[z], grid.shape[y], grid.shape[x]
    if shape[0] < 2:
        raise RejectedError(
            "geometry",
            f"volume must have at least 2 slices, got {shape[0]}. Join slices to a volume first.",
        )
    return shape


def check_spacing(spacing_mm: tuple[float, ...]) -> None:
    """Check that a spacing is one a CT can have.

    Raises:
        RejectedError: if it lies outside of ``SPACING_RANGE_MM`` or is no number.
    """
    low, high = SPACING_RANGE_MM
    if not all(math.isfinite(mm) and low <= mm <= high for mm in spacing_mm):
        raise RejectedError("spacing", f"spacing must lie in {low}..{high} mm, got {shown_mm(spacing_mm)}")


def check_size(shape: tuple[int, ...]) -> None:
    """Check that an array is no larger than a CT can be, before memory is asked for.

    Args:
        shape: of the array, of whole numbers of any size.

    Raises:
        RejectedError: if it has more than ``MAX_VOXELS`` voxels.
    """
    if math.prod(shape) > MAX_VOXELS:
        raise RejectedError("size", f"a CT must have at most {MAX_VOXELS:,} voxels, got shape {shape}")


def is_blank(shape: tuple[int, ...], affine: np.ndarray) -> bool:
    """Tell whether a grid says nothing: voxels of 1 mm, straight axes, and a corner at the world's origin.

    Tools write so where they know no geometry: NumPy's users the identity, ITK ``diag(-1, -1, 1)``; turning
    such a file leaves the origin at another corner. No scanner puts the corner of a scan there.

    Args:
        shape: of the array, three axes or more.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.

    Example:
        >>> is_blank((5, 4, 3), np.diag([-1.0, -1, 1, 1])), is_blank((5, 4, 3), np.diag([-0.7, -0.7, 1, 1]))
        (True, False)
    """
    steps = np.rint(affine[:3, :3])
    if not np.allclose(affine[:3, :3], steps, rtol=0, atol=1e-4) or not np.array_equal(
        steps @ steps.T, np.eye(3)
    ):
        return False
    ends = np.array([*product(*((0, size - 1) for size in (*shape, 1, 1)[:3]))])
    return bool((np.abs(ends @ affine[:3, :3].T + affine[:3, 3]).max(axis=1) < 1e-3).any())


def shown_mm(spacing_mm: Iterable[float]) -> str:
    """Write a spacing for a message.

    Example:
        >>> shown_mm((0.7, 0.7, 2.0))
        '(0.7, 0.7, 2)'
    """
    return "(" + ", ".join(f"{mm:g}" for mm in spacing_mm) + ")"


def canonical_indices(grid: StoredGrid) -> np.ndarray:
    """Return the ``(4, 4)`` matrix from canonical (slice, row, column) to stored (X, Y, Z) indices.

    Example:
        >>> grid = StoredGrid((5, 4, 3), np.diag([0.7, -0.7, 2, 1]), "RPS")
        >>> (canonical_indices(grid) @ [2, 1, 0, 1]).tolist()
        [4.0, 1.0, 2.0, 1.0]
    """
    matrix = np.eye(4)
    for axis, size in enumerate(grid.shape):
        # 0 at the near and 1 at the far end of the axis: axial_slices alone knows the canonical order.
        ends, _ = canonical_slices(np.indices((2, 2, 2))[axis], grid.affine)
        steps = [int(ends[corner]) - int(ends[0, 0, 0]) for corner in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
        matrix[axis] = [*steps, int(ends[0, 0, 0]) * (size - 1)]
    return matrix


def perpendicular_axes(
    affine: np.ndarray,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float]]:
    """Do as ``voxel_axes``, with an affine it refuses, or a sheared one, as a reason to reject the volume."""
    try:
        axes = voxel_axes(affine)
    except ValueError as error:
        raise RejectedError("geometry", str(error)) from error
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    shear_deg = float(np.degrees(np.arcsin(np.abs(np.triu(directions.T @ directions, 1)).max())))
    if shear_deg > SHEAR_TOLERANCE_DEG:
        raise RejectedError(
            "geometry",
            f"axes must be perpendicular, got {shear_deg:.1f} degrees off, as of a tilted gantry. "
            "Resample the volume to axial slices first.",
        )
    return axes
