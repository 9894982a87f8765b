"""Reads a CT series of DICOM files, a slice or several frames per file, in whatever order they come.

Position and orientation in the headers decide; file names and instance numbers don't. A series that is not
one evenly spaced stack is rejected: nothing is interpolated, sheared or left out to make it one.

Shapes: X Y Z voxel axes as stored: columns, rows, slices along the normal; Z H W canonical axes.
"""

import hashlib
import logging
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.ct.dicom_header import SliceHeader, parse, read_headers, reading
from common.ct.dicom_pixels import read_hu
from common.ct.geometry import CT, Grid, HUValues, axial_slices, canonical_shape, check_size
from common.ct.rejection import RejectedError

logger = logging.getLogger(__name__)

POSITION_TOLERANCE = 0.05, 0.1
"""How far a slice may lie from its place in an even stack: share of the spacing, or mm if that is more.

Never more than a quarter of the spacing. Our choice: scanners round positions to 0.1 mm and tables move
unevenly by a few per cent; a missing slice shifts others by half a spacing."""

TILT_TOLERANCE_MM = 1.0
"""How far slices may be shifted sideways over a whole series. Our choice: about a pixel; a gantry tilt of one
degree shifts by 5 mm."""

SHARED = {"Rows and Columns": "shape", "PixelSpacing": "pixel_mm", "ImageOrientationPatient": "orientation"}
"""What all slices of a series agree on, and the fields of their headers."""


def read_grid(files: Sequence[Path]) -> Grid:
    """Read on which grid the files of a series are stored: columns, rows, slices ordered by position.

    Raises:
        RejectedError: if a header is damaged or lacks something, or the slices are no even stack.
    """
    return _grid(_sorted_headers(files))


def read_ct(files: Sequence[Path]) -> CT:
    """Read a series, slice by slice, each with its own rescale; padding, which is no image, becomes -1024 HU.

    The values are those of the image without padding, the checksum is that of the files' binary SHA-256
    digests, one after another in the order of the grid's slices.

    Raises:
        RejectedError: as ``read_grid``, and if the grid is not that of an axial CT, the pixels of a file
            cannot be decoded, or values are none of a CT.
    """
    headers = _sorted_headers(files)
    grid = _grid(headers)
    canonical_shape(grid)
    stored = np.empty((len(headers), *headers[0].shape), np.int16)
    slices_of: dict[Path, list[int]] = {}
    for z, header in enumerate(headers):
        slices_of.setdefault(header.path, []).append(z)
    digests, kept = [], HUValues()
    for path, indices in slices_of.items():
        dataset = parse(path)
        with reading(path):
            for z in indices:
                read_hu(dataset, headers[z], out=stored[z], kept=kept)
        digests.append(_digest(path))
    if not kept.parts:
        detail = f"a CT must have pixels besides its padding, got none in {headers[0].name}"
        raise RejectedError("no image", detail)
    slices, spacing_mm = axial_slices(stored.transpose(2, 1, 0), grid.affine)
    return CT(slices, spacing_mm, grid, hashlib.sha256(b"".join(digests)).hexdigest(), kept)


def _sorted_headers(files: Sequence[Path]) -> list[SliceHeader]:
    """Read all headers, check that they belong together, and sort them along the normal."""
    first, *others = headers = [header for path in files for header in read_headers(path)]
    for other in others:
        for tag, field in SHARED.items():
            values = getattr(first, field), getattr(other, field)
            if not np.allclose(*values, rtol=0, atol=1e-3):
                one, two = (np.round(value, 4).tolist() for value in values)
                detail = f"slices must share {tag}, got {one} in {first.name} and {two} in {other.name}"
                raise RejectedError("geometry", detail)
    headers = _without_copies(sorted(headers, key=lambda header: float(header.position @ first.normal)))
    if len(headers) < 2:
        detail = f"a series must have at least 2 slices, got 1 in {first.name}. Add the others."
        raise RejectedError("geometry", detail)
    return headers


def _without_copies(headers: Sequence[SliceHeader]) -> list[SliceHeader]:
    """Leave out the slices of files that are copies of others, byte for byte, and say so."""
    places = Counter(tuple(header.position) for header in headers)
    shared = {header.path for header in headers if places[tuple(header.position)] > 1}
    digests = {path: _digest(path) for path in shared}
    kept: dict[tuple[bytes | Path, int], SliceHeader] = {}
    copies = []
    for header in headers:
        key = digests.get(header.path, header.path), header.frame
        if kept.setdefault(key, header) is not header:
            copies.append(header.name)
    if copies:
        logger.warning("%d slices are copies of others and count once, such as %s.", len(copies), copies[0])
    return list(kept.values())


def _digest(path: Path) -> bytes:
    with reading(path):
        return hashlib.sha256(path.read_bytes()).digest()


def _grid(headers: Sequence[SliceHeader]) -> Grid:
    """Check that sorted slices are an even, straight stack, and say where it lies."""
    first = headers[0]
    offsets = np.array([header.position - first.position for header in headers])
    heights = offsets @ first.normal
    step = _even_step(heights, headers)
    sideways = np.linalg.norm(offsets - heights[:, None] * first.normal, axis=1)
    if sideways.max() > TILT_TOLERANCE_MM:
        angle = math.degrees(math.atan2(sideways.max(), heights[sideways.argmax()]))
        raise RejectedError(
            "geometry",
            "slices must lie straight above one another, got some shifted sideways by "
            f"{sideways.max():.1f} mm, as by a gantry tilt of {angle:.1f} degrees. Convert the series with "
            "dcm2niix, which straightens it, and use that NIfTI file.",
        )
    row_mm, column_mm = first.pixel_mm
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = first.orientation[0] * column_mm, first.orientation[1] * row_mm
    affine[:3, 2], affine[:3, 3] = first.normal * step, first.position
    affine[:2] *= -1  # from LPS to RAS
    rows, columns = first.shape
    check_size((columns, rows, len(headers)))
    return Grid((columns, rows, len(headers)), affine)


def _even_step(heights: np.ndarray, headers: Sequence[SliceHeader]) -> float:
    """Return the distance of neighbouring slices, that of the even stack which fits best."""
    steps = np.diff(heights)
    closest = int(steps.argmin())
    if steps[closest] < 0.01:
        raise RejectedError(
            "duplicate",
            f"slices must lie at different positions, got the same for {headers[closest].name} and "
            f"{headers[closest + 1].name}: a series of several acquisitions or points in time, or a slice "
            "twice. Keep one of each position.",
        )
    step = _fitting_step(np.arange(len(heights)), heights)
    if step is None:
        raise _uneven(heights, headers)
    return step


def _fitting_step(places: np.ndarray, heights: np.ndarray) -> float | None:
    """Return the step of the even stack that fits best, None where a slice is too far from its place."""
    step = round(float(np.polyfit(places, heights, 1)[0]), 6)  # headers have no more decimals
    relative, at_least_mm = POSITION_TOLERANCE
    shift = float(np.ptp(heights - step * places)) / 2
    return step if shift <= min(max(relative * step, at_least_mm), step / 4) else None


def _uneven(heights: np.ndarray, headers: Sequence[SliceHeader]) -> RejectedError:
    """Say whether slices are missing, which leaves gaps in an even stack, or their spacing changes."""
    steps = np.diff(heights)
    usual = statistics.median_low(steps.tolist())
    oddest = int(np.abs(steps - usual).argmax())
    found = (
        f"slices must be evenly spaced, mostly {usual:.4g} mm, got {steps[oddest]:.4g} mm from "
        f"{headers[oddest].name} to {headers[oddest + 1].name}"
    )
    places = np.concatenate([[0], np.rint(steps / usual).cumsum()])
    if _fitting_step(places, heights) is None:
        detail = f"{found}. Its spacing changes, no slice is missing. Resample it to even spacing first."
        return RejectedError("uneven spacing", detail)
    detail = f"{found}: {int(places[-1]) - len(steps)} missing. Copy or export the series again."
    return RejectedError("missing slices", detail)
