"""Reads a CT series of DICOM files, one slice a file, in whatever order they come.

Position and orientation in the headers decide; file names and instance numbers don't. A series that is not
one evenly spaced stack is rejected: nothing is interpolated, sheared or left out to make it one.

Shapes: X Y Z voxel axes as stored: columns, rows, slices along the normal; Z H W canonical axes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nibabel as nib
import numpy as np

from common.ct.geometry import (
    HUValues,
    StoredCT,
    StoredGrid,
    canonical_shape,
    canonical_slices,
    check_size,
    store_hu,
)
from common.ct.nifti_file import MAX_INFLATION
from common.ct.rejection import RejectedError

if TYPE_CHECKING:  # takes 0.2 s to import; --help must not wait for it
    from pydicom import FileDataset

POSITION_TOLERANCE_MM = 0.1
"""How far a slice may lie from its place in an even stack, and never more than a quarter of the spacing.

Our choice: scanners round positions to 0.1 mm, and a missing slice shifts others by half a spacing."""

TILT_TOLERANCE_MM = 1.0
"""How far slices may be shifted sideways over a whole series. Our choice: about a pixel; a gantry tilt of one
degree shifts by 5 mm."""

TAGS = (
    *("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "NumberOfFrames", "SamplesPerPixel"),
    "BitsAllocated",
)
PIXEL_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)
DEFLATED = "1.2.840.10008.1.2.1.99"
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])


class SliceHeader(NamedTuple):
    """What a file says about its slice, in DICOM's world: to the left, to the back, to the head.

    Args:
        path: of the file.
        shape: rows and columns.
        pixel_mm: distance of rows and of columns.
        orientation: ``(2, 3)`` directions in which the column and the row index grow.
        position: ``(3,)`` of the first pixel in mm.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.
    """

    path: Path
    shape: tuple[int, int]
    pixel_mm: tuple[float, float]
    orientation: np.ndarray
    position: np.ndarray
    slope: float
    intercept: float


def read_grid(files: Sequence[Path]) -> StoredGrid:
    """Read on which grid a series is stored, from its headers.

    Args:
        files: of the series, one slice each, in any order.

    Returns:
        The grid: columns, rows, slices in the order of their positions along the normal.

    Raises:
        RejectedError: if a header is damaged or lacks something, or the slices are no even stack.
    """
    return _grid(_sorted_headers(files))


def read_ct(files: Sequence[Path]) -> StoredCT:
    """Read a series, slice by slice, each with its own rescale.

    Padding outside the field of view, often -3024 HU, becomes the lowest HU that is stored.

    Args:
        files: of the series, one slice each, in any order.

    Returns:
        The CT. Its checksum is that of the files' binary SHA-256 digests, one after another in the order of
        the grid's slices.

    Raises:
        RejectedError: as ``read_grid``, and if the grid is not that of an axial CT or the pixels of a file
            cannot be decoded.
    """
    headers = _sorted_headers(files)
    grid = _grid(headers)
    canonical_shape(grid)
    stored = np.empty((len(headers), *headers[0].shape), np.int16)
    seen = HUValues()
    digests = [_read_slice(header, out, seen) for out, header in zip(stored, headers, strict=True)]
    slices, spacing_mm = canonical_slices(stored.transpose(2, 1, 0), grid.affine)
    return StoredCT(slices, seen, spacing_mm, grid, hashlib.sha256(b"".join(digests)).hexdigest())


def parse(path: Path, source: Path | io.BytesIO, **options: Any) -> FileDataset:  # noqa: ANN401 (pydicom's own)
    """Parse a DICOM file without a word about small deviations from the standard.

    Args:
        path: of the file, for the message.
        source: the same path, or the file's content.
        options: of ``pydicom.dcmread``.

    Raises:
        RejectedError: if it is no DICOM file or damaged.
    """
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with _rejecting(path), _SizedFile(path) if isinstance(source, Path) else source as file:
        if _is_deflated(file):  # pydicom would inflate all of it, a thousandfold at worst
            raise ValueError("a deflated one, which scanners don't write: convert it to Explicit VR")
        file.seek(0)
        dataset = pydicom.dcmread(file, **options)
        for elements in (dataset.file_meta, dataset) if "specific_tags" in options else ():
            list(elements)  # pydicom interprets an element when it is first asked for
    return dataset


def _is_deflated(file: io.BufferedReader | io.BytesIO) -> bool:
    """Look for the transfer syntax in the elements of group 2, which stand in front of all others."""
    from pydicom.filereader import read_dataset

    for is_implicit in (False, True):  # the second is against the standard; pydicom reads it, too
        file.seek(132)
        meta = read_dataset(file, is_implicit, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        with suppress(NotImplementedError):
            if "TransferSyntaxUID" in meta:
                return bool(meta.TransferSyntaxUID == DEFLATED)
    return False


class _SizedFile(io.BufferedReader):
    """A file that gives all it has left if asked for more than its size.

    Python makes room for as much as is asked for, and a damaged header asks for gigabytes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is not None and size < self._size else -1)


@contextmanager
def _rejecting(path: Path) -> Iterator[None]:
    """Turn what pydicom and SimpleITK raise for damaged files into a rejection."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    damaged = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)
    try:
        yield
    except (*damaged, struct.error, zlib.error, BytesLengthException, InvalidDicomError) as error:
        said = str(error).strip().rsplit("\n", 1)[-1]  # SimpleITK begins with where in its sources
        raise RejectedError(
            "unreadable", f"'{path}' must be a whole DICOM file, got {said}. Copy or export it again."
        ) from error


def _sorted_headers(files: Sequence[Path]) -> list[SliceHeader]:
    """Read all headers, check that they belong together, and sort them along the normal."""
    if len(files) < 2:
        raise RejectedError(
            "geometry",
            f"a series must have at least 2 slices, got {len(files)} in '{files[0]}'. Add the others.",
        )
    headers = [_read_header(path) for path in files]
    shared: dict[str, Callable[[SliceHeader], Any]] = {
        "Rows and Columns": lambda header: header.shape,
        "PixelSpacing": lambda header: header.pixel_mm,
        "ImageOrientationPatient": lambda header: header.orientation,
    }
    for header in headers[1:]:
        for name, of in shared.items():
            if not np.allclose(of(header), of(headers[0]), rtol=0, atol=1e-3):
                raise RejectedError(
                    "geometry",
                    f"slices must share {name}, got {_shown(of(headers[0]))} in '{headers[0].path}' "
                    f"and {_shown(of(header))} in '{header.path}'",
                )
    normal = _normal(headers[0])
    return sorted(headers, key=lambda header: float(header.position @ normal))


def _read_header(path: Path) -> SliceHeader:
    dataset = parse(path, path, stop_before_pixels=True, specific_tags=list(TAGS))
    if dataset.get("NumberOfFrames") not in (None, 1):
        raise RejectedError(
            "multi-frame", f"'{path}' must hold one slice, got {dataset.NumberOfFrames}. Convert it to NIfTI."
        )
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise RejectedError("unreadable", f"pixels of '{path}' must be numbers, got colours")
    slope, intercept = _rescale(dataset, path)
    (rows,), (columns,) = (_numbers(dataset, name, 1, path) for name in ("Rows", "Columns"))
    row_mm, column_mm = _numbers(dataset, "PixelSpacing", 2, path)
    if min(rows, columns, row_mm, column_mm) <= 0:
        raise RejectedError(
            "spacing",
            f"pixels must have a size, got {rows:g} x {columns:g} of {row_mm:g} x {column_mm:g} mm "
            f"in '{path}'",
        )
    orientation = np.reshape(_numbers(dataset, "ImageOrientationPatient", 6, path), (2, 3))
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-2):
        raise RejectedError(
            "geometry",
            "ImageOrientationPatient must be perpendicular directions, "
            f"got {_shown(orientation)} in '{path}'",
        )
    position = np.array(_numbers(dataset, "ImagePositionPatient", 3, path))
    shape = int(rows), int(columns)
    _check_file_size(dataset, shape, path)
    return SliceHeader(path, shape, (row_mm, column_mm), orientation, position, slope, intercept)


def _check_file_size(dataset: FileDataset, shape: tuple[int, int], path: Path) -> None:
    """Check that a file is large enough for its pixels, before memory for them is asked for."""
    (bits,) = _numbers(dataset, "BitsAllocated", 1, path)
    with _rejecting(path):
        is_packed = dataset.file_meta.TransferSyntaxUID.is_compressed
        size = path.stat().st_size
        if math.prod(shape) * max(bits, 8) / 8 > size * (MAX_INFLATION if is_packed else 1):
            raise EOFError(f"{size} bytes for {shape[0]} x {shape[1]} pixels")


def _rescale(dataset: FileDataset, path: Path) -> tuple[float, float]:
    unit = str(dataset.get("RescaleType") or "HU")  # absent: HU, by the standard's CT image module
    if unit.upper() != "HU":
        raise RejectedError("not in HU", f"RescaleType must be HU or absent, got '{unit}' in '{path}'")
    (slope,) = _numbers(dataset, "RescaleSlope", 1, path)
    (intercept,) = _numbers(dataset, "RescaleIntercept", 1, path)
    if slope <= 0:
        raise RejectedError("rescale", f"RescaleSlope must be positive, got {slope:g} in '{path}'")
    return slope, intercept


def _numbers(dataset: FileDataset, name: str, count: int, path: Path) -> list[float]:
    value = dataset.get(name)
    try:
        numbers = [float(number) for number in (value if count > 1 else [value])]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise RejectedError("metadata", f"{name} must be {wanted}, got {value!r} in '{path}'")
    return numbers


def _normal(header: SliceHeader) -> np.ndarray:
    normal = np.cross(header.orientation[0], header.orientation[1])
    return normal / np.linalg.norm(normal)


def _grid(headers: Sequence[SliceHeader]) -> StoredGrid:
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
            f"{sideways.max():.1f} mm, as by a gantry tilt of {angle:.1f} degrees",
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
    axcodes = "".join(str(code) for code in nib.orientations.aff2axcodes(affine))
    return StoredGrid((columns, rows, len(headers)), affine, axcodes)


def _even_step(heights: np.ndarray, headers: Sequence[SliceHeader]) -> float:
    """Return the distance of neighbouring slices, all the same."""
    steps = np.diff(heights)
    closest = int(steps.argmin())
    if steps[closest] < 0.01:
        raise RejectedError(
            "duplicate",
            f"slices must lie at different positions, got the same for '{headers[closest].path}' and "
            f"'{headers[closest + 1].path}': a series of several acquisitions, or a file twice. "
            "Keep one of each position.",
        )
    step = float(heights[-1]) / len(steps)
    usual = float(np.median(steps))
    shift = np.abs(heights - step * np.arange(len(heights))).max()
    if shift > min(POSITION_TOLERANCE_MM, step / 4):
        oddest = int(np.abs(steps - usual).argmax())
        raise RejectedError(
            "missing slices",
            f"slices must be evenly spaced, mostly {usual:g} mm, got {steps[oddest]:g} mm from "
            f"'{headers[oddest].path}' to '{headers[oddest + 1].path}'. Copy or export the series again.",
        )
    return step


def _read_slice(header: SliceHeader, out: np.ndarray, seen: HUValues) -> bytes:
    """Read a slice in HU into ``out``; return the digest of its file."""
    path = header.path
    with _rejecting(path):
        content = path.read_bytes()
    dataset = parse(path, io.BytesIO(content))
    with _rejecting(path):
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            values = _decoded(dataset)
        else:
            values = dataset.pixel_array
        if values.shape != header.shape:
            raise ValueError(f"pixels of shape {values.shape} under a header of {header.shape}")
        is_finite = store_hu(values, header.slope, header.intercept, out, seen)
    if not is_finite:
        raise RejectedError("non-finite voxels", f"voxels must be finite, got NaN or infinity in '{path}'")
    return hashlib.sha256(content).digest()


def _decoded(dataset: FileDataset) -> np.ndarray:
    """Decode JPEG, JPEG-LS, JPEG 2000 or run lengths.

    GDCM, which does it, makes gigabytes ready where lengths in a file are wrong. It is given the pixels
    alone, in a file of our own, whose lengths are right.
    """
    import SimpleITK
    from pydicom import Dataset
    from pydicom.encaps import encapsulate, get_frame

    image = Dataset()
    image.file_meta = dataset.file_meta
    for name in PIXEL_TAGS:
        if name in dataset:
            image[name] = dataset[name]
    image.PixelData = encapsulate([get_frame(dataset.PixelData, 0, number_of_frames=1)])
    image["PixelData"].is_undefined_length = True
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    with tempfile.NamedTemporaryFile(prefix="dale-ct-", suffix=".dcm") as file:
        image.save_as(file, enforce_file_format=True)
        file.flush()
        reader.SetFileName(file.name)
        return np.asarray(SimpleITK.GetArrayFromImage(reader.Execute()))[0]


def _shown(value: Any) -> str:  # noqa: ANN401 (tuples and arrays alike)
    return str(np.round(value, 4).tolist())
