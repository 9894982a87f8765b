"""Reads a CT series of DICOM files, a slice or several frames per file, in whatever order they come.

Position and orientation in the headers decide; file names and instance numbers don't. A series that is not
one evenly spaced stack is rejected: nothing is interpolated, sheared or left out to make it one.

Shapes: X Y Z voxel axes as stored: columns, rows, slices along the normal; Z H W canonical axes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.ct.dicom_header import SliceHeader, parse, read_headers, rejecting
from common.ct.dicom_pixels import read_hu
from common.ct.geometry import CT, Grid, HUValues, axial_slices, canonical_shape, check_size
from common.ct.rejection import RejectedError

if TYPE_CHECKING:  # takes 0.2 s to import; --help must not wait for it
    pass

logger = logging.getLogger(__name__)

POSITION_TOLERANCE = 0.05, 0.1
"""How far a slice may lie from its place in an even stack: of the spacing, or this many mm if that is more.

Never more than a quarter of the spacing. Our choice: scanners round positions to 0.1 mm and tables move
unevenly by a few per cent; a missing slice shifts others by half a spacing."""

TILT_TOLERANCE_MM = 1.0
"""How far slices may be shifted sideways over a whole series. Our choice: about a pixel; a gantry tilt of one
degree shifts by 5 mm."""

LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


def read_grid(files: Sequence[Path]) -> Grid:
    """Read on which grid a series is stored, from its headers.

    Args:
        files: of the series, in any order.

    Returns:
        The grid: columns, rows, slices in the order of their positions along the normal.

    Raises:
        RejectedError: if a header is damaged or lacks something, or the slices are no even stack.
    """
    return _grid(_sorted_headers(files))


def read_ct(files: Sequence[Path]) -> CT:
    """Read a series, slice by slice, each with its own rescale.

    Padding, which the header names and which is no part of the image, becomes -1024 HU.

    Args:
        files: of the series, in any order.

    Returns:
        The CT. Its values are those of the image without padding, its checksum that of the files' binary
        SHA-256 digests, one after another in the order of the grid's slices.

    Raises:
        RejectedError: as ``read_grid``, and if the grid is not that of an axial CT, the pixels of a file
            cannot be decoded, or values are none of a CT.
    """
    headers = _sorted_headers(files)
    grid = _grid(headers)
    canonical_shape(grid)
    stored = np.empty((len(headers), *headers[0].shape), np.int16)
    of_file: dict[Path, list[int]] = {}
    for z, header in enumerate(headers):
        of_file.setdefault(header.path, []).append(z)
    digests, kept = [], HUValues()
    for path, indices in of_file.items():
        content = _content(path)
        dataset = parse(path, io.BytesIO(content))
        for z in indices:
            slope, intercept, where = headers[z].slope, headers[z].intercept, headers[z].name
            with rejecting(path):
                read_hu(dataset, headers[z].frame, slope, intercept, out=stored[z], kept=kept, where=where)
        digests.append(hashlib.sha256(content).digest())
    if not kept.parts:
        raise RejectedError(
            "no image", f"a CT must have pixels that are no padding, got none in {headers[0].name}"
        )
    slices, spacing_mm = axial_slices(stored.transpose(2, 1, 0), grid.affine)
    return CT(slices, spacing_mm, grid, hashlib.sha256(b"".join(digests)).hexdigest(), kept)


def _sorted_headers(files: Sequence[Path]) -> list[SliceHeader]:
    """Read all headers, check that they belong together, and sort them along the normal."""
    headers = [header for path in files for header in read_headers(path)]
    shared: dict[str, Callable[[SliceHeader], Any]] = {
        "Rows and Columns": lambda header: header.shape,
        "PixelSpacing": lambda header: header.pixel_mm,
        "ImageOrientationPatient": lambda header: header.orientation,
    }
    for header in headers[1:]:
        for tag, of in shared.items():
            if not np.allclose(of(header), of(headers[0]), rtol=0, atol=1e-3):
                raise RejectedError(
                    "geometry",
                    f"slices must share {tag}, got {_shown(of(headers[0]))} in {headers[0].name} "
                    f"and {_shown(of(header))} in {header.name}",
                )
    normal = _normal(headers[0])
    headers = _without_copies(sorted(headers, key=lambda header: float(header.position @ normal)))
    if len(headers) < 2:
        raise RejectedError(
            "geometry", f"a series must have at least 2 slices, got 1 in {headers[0].name}. Add the others."
        )
    return headers


def _without_copies(headers: Sequence[SliceHeader]) -> list[SliceHeader]:
    """Leave out the slices of files that are copies of others, byte for byte, and say so."""
    places = Counter(tuple(header.position) for header in headers)
    shared = {header.path for header in headers if places[tuple(header.position)] > 1}
    digests = {path: hashlib.sha256(_content(path)).digest() for path in shared}
    kept: dict[tuple[bytes | Path, int], SliceHeader] = {}
    copies = []
    for header in headers:
        key = digests.get(header.path, header.path), header.frame
        if kept.setdefault(key, header) is not header:
            copies.append(header.name)
    if copies:
        logger.warning("%d slices are copies of others and count once, such as %s.", len(copies), copies[0])
    return list(kept.values())


def _content(path: Path) -> bytes:
    with rejecting(path):
        return path.read_bytes()


def _normal(header: SliceHeader) -> np.ndarray:
    normal = np.cross(header.orientation[0], header.orientation[1])
    return normal / np.linalg.norm(normal)


def _grid(headers: Sequence[SliceHeader]) -> Grid:
    """Check that sorted slices are an even, straight stack, and say where it lies."""
    first = headers[0]
    normal = _normal(first)
    offsets = np.array([header.position - first.position for header in headers])
    heights = offsets @ normal
    step = _even_step(heights, headers)
    sideways = np.linalg.norm(offsets - heights[:, None] * normal, axis=1)
    if sideways.max() > TILT_TOLERANCE_MM:
        angle = math.degrees(math.atan2(sideways.max(), heights[sideways.argmax()]))
        raise RejectedError(
            "geometry",
            "slices must lie straight above one another, got some shifted sideways by "
            f"{sideways.max():.1f} mm, as by a gantry tilt of {angle:.1f} degrees. Convert it with dcm2niix, "
            "which straightens it, and use that NIfTI file.",
        )
    row_mm, column_mm = first.pixel_mm
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack(
        [first.orientation[0] * column_mm, first.orientation[1] * row_mm, normal * step]
    )
    affine[:3, 3] = first.position
    affine[:3] *= LPS_TO_RAS[:, None]
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
    num_missing = int(places[-1]) - len(steps)
    return RejectedError(
        "missing slices", f"{found}: {num_missing} missing. Copy or export the series again."
    )


def _shown(value: Any) -> str:  # noqa: ANN401 (tuples or arrays)
    return str(np.round(value, 4).tolist())
