"""Turns a stored array into axial slices in HU, the right way up: what the readers of all formats share.

Shapes: X Y Z voxel axes as stored; Z H W canonical axes: slices from feet to head, rows from front to back,
columns from the patient's right to the left.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import nibabel as nib
import numpy as np

from common.ct.rejection import Doubt, RejectedError

STORED_HU_RANGE = (-1024, 3071)
"""What shards keep, in HU: the 12 bits of a scanner without extended range; wider than every HU window."""

MAX_OBLIQUITY_DEG = 10.0
"""How far axes may be turned from those of the body. Our choice: tilted by more, slices are not axial."""

SHEAR_TOLERANCE_DEG = 0.5
"""How far axes may be from perpendicular. Our choice: headers round by less, gantries tilt by degrees."""

SPACING_TOLERANCE = 0.05
"""How far two statements of a spacing may differ. Our choice: headers round, another scan differs by more."""

SPACING_RANGE_MM = (0.1, 20.0)
"""Spacings a chest CT can have. Our choice: CT-RATE's metadata has 0.035 mm, no scanner has."""

MAX_EXTENT_MM = 2500
"""Length of a whole body on its couch. Our choice: what is longer has its spacing in other units."""

MAX_VOXELS = 2**31
"""Voxels a CT can have: 4 GiB of HU. Our choice: 2,048 slices of 1024 x 1024, which no scanner exceeds."""


class Grid(NamedTuple):
    """The voxel grid of a CT as it is stored.

    Args:
        shape: ``(X, Y, Z)`` of the stored array.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        has_origin: whether the affine says where in the world the grid lies. Nothing does for CT-RATE's raw
            volumes; masks are then compared by shape and spacing alone.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    has_origin: bool = True

    @property
    def axcodes(self) -> str:
        """Where the stored axes point, see :func:`axcodes`."""
        return axcodes(self.affine)


class HUValues:
    """What is kept of values before the clip: the extremes, and some 64 x 64 of each plane as a sample."""

    def __init__(self) -> None:
        self.lowest, self.highest = math.inf, -math.inf
        self.parts: list[np.ndarray] = []

    def add(self, hu: np.ndarray) -> bool:
        """Take in planes, ``(X, Y)`` or ``(X, Y, N)``; return whether all values are finite."""
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


class CT(NamedTuple):
    """A CT that was read whole.

    Args:
        hu: ``(Z, H, W)`` int16 canonical slices, rounded and clipped to ``STORED_HU_RANGE``.
        spacing_mm: as (x, y, z): columns, rows, slices.
        grid: on which it is stored.
        sha256: checksum of the file's bytes; of a DICOM series, of the files' digests in the slices' order.
        values: what the values were before the clip.
        doubts: what makes it unlike a chest CT, see :func:`common.ct.checks.find_doubts`.
        blank: numbers of its blank slices, from 0.
    """

    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    grid: Grid
    sha256: str
    values: HUValues
    doubts: Sequence[Doubt] = ()
    blank: Sequence[int] = ()


def canonical_axes(
    affine: np.ndarray,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, float, float]]:
    """Find along which voxel axes slices, rows and columns run, and which way.

    Args:
        affine: ``(4, 4)`` voxel to RAS+ world coordinates in mm.

    Returns:
        For slices, rows and columns the voxel axis, and 1 or -1 as its index grows the canonical way or not;
        and the spacing in mm as (x, y, z).

    Raises:
        RejectedError: if the affine is not a finite 4 x 4 matrix of perpendicular axes, or turned by more
            than 10 degrees from the axes of the body.

    Example:
        >>> canonical_axes(np.array([[0, 0, -0.8, 0], [0, -0.8, 0, 0], [-2.5, 0, 0, 0], [0, 0, 0, 1]]))
        ((0, 1, 2), (-1, 1, 1), (0.8, 0.8, 2.5))
    """
    matrix = np.asarray(affine, dtype=np.float64)
    shown = np.round(matrix, 3).tolist()
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise RejectedError("geometry", f"affine must be a finite 4 x 4 matrix, got {shown}.")
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    cosines = matrix[:3, :3] / np.where(spacing, spacing, 1)
    # 1 for perpendicular axes, 0 for axes in a plane; two that share their closest world axis stay below 1/2.
    if abs(np.linalg.det(cosines)) < 0.5:
        raise RejectedError("geometry", f"affine must have three perpendicular axes, got {shown}.")
    turned_deg = float(np.degrees(np.arccos(np.abs(cosines).max(axis=0).clip(max=1))).max())
    if turned_deg > MAX_OBLIQUITY_DEG:
        said = f"affine must be within {MAX_OBLIQUITY_DEG:g} degrees of the world axes, got {turned_deg:.1f}"
        raise RejectedError("geometry", f"{said}. Resample the volume to axial slices first.")
    shear_deg = float(np.degrees(np.arcsin(np.abs(np.triu(cosines.T @ cosines, 1)).max())))
    if shear_deg > SHEAR_TOLERANCE_DEG:
        said = f"axes must be perpendicular, got {shear_deg:.1f} degrees off, as from a tilted gantry"
        raise RejectedError("geometry", f"{said}. Resample the volume to axial slices first.")
    x, y, z = (int(axis) for axis in np.argsort(np.abs(cosines).argmax(axis=0)))
    # canonical indices grow to the head, back and left, world coordinates to the head, front and right
    steps = int(np.sign(cosines[2, z])), -int(np.sign(cosines[1, y])), -int(np.sign(cosines[0, x]))
    return (z, y, x), steps, (float(spacing[x]), float(spacing[y]), float(spacing[z]))


def axial_slices(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Show a stored volume as axial slices the radiological way: feet to head, front to back, right to left.

    The affine alone decides, so one scan stored as RAS, LPS, LAS or (Z, Y, X) gives the same slices. CT and
    masks take the same path. Voxels are permuted and flipped, never resampled: the angle of an oblique scan
    stays in it.

    Args:
        volume: ``(X, Y, Z)`` of any dtype, axes as stored.
        affine: ``(4, 4)`` voxel to RAS+ world coordinates in mm.

    Returns:
        The slices ``(Z, H, W)``, a view of ``volume``, and their spacing in mm as (x, y, z).

    Raises:
        RejectedError: if the volume is not 3-D, or as ``canonical_axes``.

    Example:
        >>> stored = np.arange(2 * 3 * 5).reshape(2, 3, 5)
        >>> slices, spacing_mm = axial_slices(stored, np.diag([-0.7, -0.8, 1.5, 1.0]))
        >>> slices.shape, spacing_mm
        ((5, 3, 2), (0.7, 0.8, 1.5))
        >>> bool((slices == stored.transpose(2, 1, 0)).all())
        True
    """
    if volume.ndim != 3:
        raise RejectedError("geometry", f"volume must have 3 axes, got shape {volume.shape}.")
    order, steps, spacing_mm = canonical_axes(affine)
    return volume.transpose(order)[tuple(slice(None, None, step) for step in steps)], spacing_mm


def canonical_indices(grid: Grid) -> np.ndarray:
    """Return the ``(4, 4)`` matrix from canonical (slice, row, column) to stored (X, Y, Z) indices."""
    order, steps, _ = canonical_axes(grid.affine)
    matrix = np.diag([0.0, 0, 0, 1])
    for canonical, (axis, step) in enumerate(zip(order, steps, strict=True)):
        matrix[axis, canonical] = step
        matrix[axis, 3] = 0 if step > 0 else grid.shape[axis] - 1
    return matrix


def canonical_shape(grid: Grid) -> tuple[int, int, int]:
    """Return the shape ``(Z, H, W)`` of the canonical slices of a grid.

    Raises:
        RejectedError: if the affine is not that of an axial scan, its size, spacing or extent not a CT's, or
            there are fewer than two slices.
    """
    check_size(grid.shape)
    spacing_mm = tuple(np.linalg.norm(grid.affine[:3, :3], axis=0).tolist())
    check_spacing(spacing_mm)
    extent_mm = max(voxels * mm for voxels, mm in zip(grid.shape, spacing_mm, strict=True))
    if extent_mm > MAX_EXTENT_MM:
        what = f"{extent_mm:.0f} mm: shape {grid.shape} with spacing {shown_mm(spacing_mm)}"
        raise RejectedError("spacing", f"a CT must be at most {MAX_EXTENT_MM} mm long, got {what}")
    (z, y, x), _, _ = canonical_axes(grid.affine)
    if grid.shape[z] < 2:
        detail = f"volume must have at least 2 slices, got {grid.shape[z]}. Join slices to a volume first."
        raise RejectedError("geometry", detail)
    return grid.shape[z], grid.shape[y], grid.shape[x]


def check_spacing(spacing_mm: tuple[float, ...]) -> None:
    """Refuse a spacing that no CT can have: outside ``SPACING_RANGE_MM``, or no number."""
    low, high = SPACING_RANGE_MM
    if not all(math.isfinite(mm) and low <= mm <= high for mm in spacing_mm):
        raise RejectedError("spacing", f"spacing must lie in {low}..{high} mm, got {shown_mm(spacing_mm)}")


def check_size(shape: tuple[int, ...]) -> None:
    """Refuse an array of more than ``MAX_VOXELS`` voxels, before memory is asked for."""
    if math.prod(shape) > MAX_VOXELS:
        raise RejectedError("size", f"a CT must have at most {MAX_VOXELS:,} voxels, got shape {shape}")


def is_blank(shape: tuple[int, ...], affine: np.ndarray) -> bool:
    """Tell whether a grid states no geometry: voxels of 1 mm, straight axes, a corner at the world's origin.

    Tools that know no geometry write this: NumPy's users the identity, ITK ``diag(-1, -1, 1)``; turning
    such a file leaves the origin at another corner. No scanner puts the corner of a scan there.
    """
    steps = np.rint(affine[:3, :3])
    is_whole = np.allclose(affine[:3, :3], steps, rtol=0, atol=1e-4)
    if not (is_whole and np.array_equal(steps @ steps.T, np.eye(3))):
        return False
    ends = np.array([*product(*((0, size - 1) for size in (*shape, 1, 1)[:3]))])
    return bool((np.abs(ends @ affine[:3, :3].T + affine[:3, 3]).max(axis=1) < 1e-3).any())


def axcodes(affine: np.ndarray) -> str:
    """Return where the axes of an affine point, such as ``LPS``; empty where it is not finite."""
    if not np.isfinite(affine).all():
        return ""
    return "".join(str(code) for code in nib.orientations.aff2axcodes(affine))


def shown_mm(spacing_mm: Iterable[float]) -> str:
    """Write a spacing for a message, as ``(0.7, 0.7, 2)``."""
    return "(" + ", ".join(f"{mm:g}" for mm in spacing_mm) + ")"


def store_hu(
    values: np.ndarray, slope: float, intercept: float, *, out: np.ndarray, kept: HUValues, where: str
) -> None:
    """Turn stored values into HU as shards keep them: rounded to whole HU, clipped, never wrapped.

    Args:
        values: of any integer or float type.
        slope: HU = slope * stored + intercept, computed in float64 or in whole numbers, which is the same.
        intercept: see ``slope``.
        out: int16 of the same shape, filled with HU in ``STORED_HU_RANGE``.
        kept: takes in the values before the clip.
        where: the part of the volume, for the message.

    Raises:
        RejectedError: if a value is not finite.
    """
    low, high = STORED_HU_RANGE
    if values.dtype.kind in "iu" and _fits_int32(values.dtype, slope, intercept):
        if values.dtype != np.int16 or (slope, intercept) != (1, 0):
            values = values.astype(np.int32)
            values *= int(slope)
            values += int(intercept)
        np.clip(values, low, high, out=out, casting="unsafe")
        kept.add(values)
        return
    hu = values * np.float64(slope) + intercept
    if not kept.add(hu):
        raise RejectedError("non-finite voxels", f"voxels must be finite, got NaN or infinity in {where}")
    np.clip(np.rint(hu, out=hu), low, high, out=out, casting="unsafe")


def _fits_int32(dtype: np.dtype, slope: float, intercept: float) -> bool:
    """Tell whether the rescale is in whole numbers, and every value and product of it fits 32 bits."""
    if not (float(slope).is_integer() and float(intercept).is_integer()):
        return False
    products = [int(slope) * bound for bound in (np.iinfo(dtype).min, np.iinfo(dtype).max)]
    reached = [*products, *(product + int(intercept) for product in products), int(slope), int(intercept)]
    return max(map(abs, reached)) < 2**31


@contextmanager
def rejecting(name: str, damage: tuple[type[Exception], ...]) -> Iterator[None]:
    """Refuse a file if reading it raises one of ``damage``; the last line of the error says what is wrong."""
    try:
        yield
    except RejectedError:
        raise
    except damage as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1][-200:]
        detail = f"Cannot read {name}: {said}. Copy or download it again."
        raise RejectedError("unreadable", detail) from error
