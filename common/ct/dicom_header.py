"""Parses DICOM files: where their slices lie and how their values become HU; one slice, or one per frame."""

import io
import math
import os
import struct
import zlib
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom import FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pydicom.values import converters

from common.ct.geometry import rejecting
from common.ct.nifti import MAX_INFLATION
from common.ct.rejection import RejectedError

FIRST_GROUPS = (2, 4, 8)
"""Groups of elements a file without a preamble begins with: meta information, directory, identification."""

TAGS = (
    *("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SliceLocation"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "StackID"),
)
FRAME_TAGS = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
FUNCTIONAL_GROUPS = (
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "FrameContentSequence"),
)

SYNTAXES = {(False, True): ExplicitVRLittleEndian, (False, False): ExplicitVRBigEndian}
"""Transfer syntaxes of uncompressed files by whether they are implicit and little endian; else implicit."""

DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError),
    *(struct.error, zlib.error, BytesLengthException, InvalidDicomError),
)
"""What pydicom and SimpleITK raise for damaged files."""


class SliceHeader(NamedTuple):
    """What a file says about one of its slices, in DICOM's world: to the left, to the back, to the head.

    Args:
        path: the file.
        frame: index in the file.
        shape: rows and columns.
        pixel_mm: distance of rows and of columns.
        orientation: ``(2, 3)`` directions in which the column and the row index grow.
        position: ``(3,)`` of the first pixel in mm.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.
        name: the file in quotes, and the frame if there are several.
    """

    path: Path
    frame: int
    shape: tuple[int, int]
    pixel_mm: tuple[float, float]
    orientation: np.ndarray
    position: np.ndarray
    slope: float
    intercept: float
    name: str

    @property
    def normal(self) -> np.ndarray:
        """``(3,)`` direction of length 1 across the slice."""
        normal = np.cross(self.orientation[0], self.orientation[1])
        return normal / np.linalg.norm(normal)


def reading(path: Path) -> AbstractContextManager[None]:
    """Turn what pydicom and SimpleITK raise for a damaged file into a rejection."""
    return rejecting(f"'{path}' as DICOM", DAMAGED)


def parse(path: Path, **options: Any) -> FileDataset:  # noqa: ANN401 (pydicom's own)
    """Parse a DICOM file with options of ``pydicom.dcmread``, and accept small deviations from the standard.

    The preamble, the meta information or both may be missing, as in files of old archives; the transfer
    syntax in the meta information of what is returned is then that of the elements.

    Raises:
        RejectedError: if it is no DICOM file or damaged.
    """
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with reading(path), _SizedFile(path) as file:
        start = elements_start(file)
        if start is None:
            raise ValueError("it begins with neither a preamble nor an element")
        if _is_deflated(file, start):  # pydicom would inflate all of it, a thousandfold at worst
            raise ValueError("it is deflated, which scanners don't write. Convert it to Explicit VR")
        file.seek(0)
        dataset = pydicom.dcmread(file, force=True, **options)
        if not dataset.file_meta.get("TransferSyntaxUID"):
            encoding: Any = dataset.original_encoding
            dataset.file_meta.TransferSyntaxUID = SYNTAXES.get(encoding, ImplicitVRLittleEndian)
        for elements in (dataset.file_meta, dataset) if "specific_tags" in options else ():
            list(elements)  # pydicom interprets an element when it is first asked for
    return dataset


def elements_start(file: BinaryIO) -> int | None:
    """Return the byte at which a DICOM file's elements start; None if the file is none.

    Without a preamble, the first element must be one that DICOM files begin with: short, of a known type.
    """
    file.seek(0)
    head = file.read(132)
    if head[128:] == b"DICM":
        return 132
    if len(head) < 8:
        return None
    for order in "<>":
        group, element, length = struct.unpack(f"{order}HHI", head[:8])
        is_explicit = head[4:6].decode("latin-1") in converters
        if group in FIRST_GROUPS and element < 0x2000 and (is_explicit or length < 1024):
            return 0
    return None


def _is_deflated(file: BinaryIO, start: int) -> bool:
    """Look for the transfer syntax in the elements of group 2, which stand in front of all others."""
    for is_implicit in (False, True):  # the second is against the standard; pydicom reads it, too
        file.seek(start)
        meta = read_dataset(file, is_implicit, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        with suppress(NotImplementedError):
            if "TransferSyntaxUID" in meta:
                return bool(meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian)
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


def read_headers(path: Path) -> list[SliceHeader]:
    """Read the header of each slice of a file, of Enhanced CT from its functional groups.

    Raises:
        RejectedError: if something is missing, contradicts itself, or is no CT in HU.
    """
    dataset = parse(path, stop_before_pixels=True, specific_tags=[*TAGS, *FRAME_TAGS])
    frames = frame_values(dataset, TAGS, path)
    num_stacks = len({str(values.get("StackID") or "") for values in frames})
    if num_stacks > 1:
        detail = (
            f"'{path}' must hold one stack of slices, got {num_stacks}. Export each as a series of its own."
        )
        raise RejectedError("multi-frame", detail)
    headers = []
    for i, values in enumerate(frames):
        name = f"'{path}'" if len(frames) == 1 else f"'{path}' frame {i + 1}"
        headers.append(_header(values, path, i, name))
    bits = _number(frames[0], "BitsAllocated", f"'{path}'")
    with reading(path):
        is_packed = dataset.file_meta.TransferSyntaxUID.is_compressed
        shape = len(headers), *headers[0].shape
        if math.prod(shape) * max(bits, 8) / 8 > path.stat().st_size * (MAX_INFLATION if is_packed else 1):
            raise EOFError(f"it is too short for {' x '.join(map(str, shape))} pixels")
    return headers


def frame_values(dataset: FileDataset, names: Collection[str], path: Path) -> list[dict[str, Any]]:
    """Return the values of elements for each frame, by name; a frame's own group decides over the shared one.

    Raises:
        RejectedError: if there is not one functional group per frame.
    """
    with reading(path):
        num_frames = int(dataset.get("NumberOfFrames") or 1)
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())
        groups = [[group] for group in dataset.get("PerFrameFunctionalGroupsSequence") or ()]
        if len(groups or [[]]) != num_frames:
            detail = f"'{path}' must say where each of its {num_frames} frames lies, got {len(groups)} items"
            raise RejectedError("multi-frame", f"{detail} in {FRAME_TAGS[2]}. Convert it to NIfTI.")
        frames = []
        for of_frame in groups or [[]]:
            items = [
                item
                for group in (*shared, *of_frame)
                for name in FUNCTIONAL_GROUPS
                for item in group.get(name) or ()
            ]
            frames.append({name: of[name].value for of in (dataset, *items) for name in names if name in of})
    return frames


def _header(values: Mapping[str, Any], path: Path, frame: int, name: str) -> SliceHeader:
    _check_pixels(values, name)
    slope, intercept = _rescale(values, name)
    rows, columns = (_number(values, tag, name) for tag in ("Rows", "Columns"))
    row_mm, column_mm = _numbers(values, "PixelSpacing", 2, name)
    if min(rows, columns, row_mm, column_mm) <= 0:
        detail = f"got {rows:g} x {columns:g} of {row_mm:g} x {column_mm:g} mm in {name}"
        raise RejectedError("spacing", f"pixels must have a size, {detail}")
    orientation = np.reshape(_numbers(values, "ImageOrientationPatient", 6, name), (2, 3))
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-2):
        detail = f"must be perpendicular directions, got {orientation.tolist()} in {name}"
        raise RejectedError("geometry", f"ImageOrientationPatient {detail}")
    position = np.array(_numbers(values, "ImagePositionPatient", 3, name))
    shape = int(rows), int(columns)
    return SliceHeader(path, frame, shape, (row_mm, column_mm), orientation, position, slope, intercept, name)


def _check_pixels(values: Mapping[str, Any], name: str) -> None:
    photometric = str(values.get("PhotometricInterpretation") or "MONOCHROME2")
    if (values.get("SamplesPerPixel") or 1) != 1 or not photometric.startswith("MONOCHROME"):
        raise RejectedError("unreadable", f"pixels of {name} must be numbers, got colors")
    if values.get("BitsStored") is None or values.get("HighBit") is None:
        return
    stored, high = (_number(values, tag, name) for tag in ("BitsStored", "HighBit"))
    if high != stored - 1:
        detail = f"HighBit must be BitsStored - 1, got {high:g} and {stored:g} in {name}"
        raise RejectedError("unreadable", detail)


def _rescale(values: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Return slope and intercept, which a CT must state: SimpleITK takes 1 and 0 and so raw values for HU."""
    unit = str(values.get("RescaleType") or "").strip() or "HU"  # absent: HU, by the standard's CT module
    if unit.upper() != "HU":
        raise RejectedError("not in HU", f"RescaleType must be HU or absent, got '{unit}' in {name}")
    slope, intercept = (_number(values, tag, name) for tag in ("RescaleSlope", "RescaleIntercept"))
    if slope <= 0:
        raise RejectedError("rescale", f"RescaleSlope must be positive, got {slope:g} in {name}")
    return slope, intercept


def _number(values: Mapping[str, Any], tag: str, name: str) -> float:
    return _numbers(values, tag, 1, name)[0]


def _numbers(values: Mapping[str, Any], tag: str, count: int, name: str) -> list[float]:
    value: Any = values.get(tag)
    try:
        numbers = [float(number) for number in (value if count > 1 else [value])]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        wanted = "a number" if count == 1 else f"{count} numbers"
        why = ""
        if tag == "ImagePositionPatient" and values.get("SliceLocation") is not None:
            why = ". SliceLocation cannot stand in for it: its origin and direction are not defined"
        raise RejectedError("metadata", f"{tag} must be {wanted}, got {value!r} in {name}{why}")
    return numbers
