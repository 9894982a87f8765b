"""Reads where the slices of a DICOM file lie and how their values become HU: one slice, or one per frame."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from common.ct.nifti import MAX_INFLATION
from common.ct.rejection import RejectedError

if TYPE_CHECKING:  # takes 0.2 s to import; --help must not wait for it
    from pydicom import FileDataset
    from pydicom.uid import UID

DEFLATED = "1.2.840.10008.1.2.1.99"
FIRST_GROUPS = (2, 4, 8)
"""Groups of elements a file without a preamble begins with: meta information, directory, identification."""


def parse(path: Path, source: Path | io.BytesIO, **options: Any) -> FileDataset:  # noqa: ANN401 (pydicom's own)
    """Parse a DICOM file without a word about small deviations from the standard.

    The preamble, the meta information or both may be missing, as in files of old archives; the transfer
    syntax in the meta information of what is returned is then that of the elements.

    Args:
        path: of the file, for the message.
        source: the same path, or the file's content.
        options: of ``pydicom.dcmread``.

    Raises:
        RejectedError: if it is no DICOM file or damaged.
    """
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with rejecting(path), _SizedFile(path) if isinstance(source, Path) else source as file:
        start = elements_start(file)
        if start is None:
            raise ValueError("it begins with neither a preamble nor an element")
        if _is_deflated(file, start):  # pydicom would inflate all of it, a thousandfold at worst
            raise ValueError("it is deflated, which scanners don't write. Convert it to Explicit VR")
        file.seek(0)
        dataset = pydicom.dcmread(file, force=True, **options)
        if not dataset.file_meta.get("TransferSyntaxUID"):
            dataset.file_meta.TransferSyntaxUID = _found_syntax(dataset)
        for elements in (dataset.file_meta, dataset) if "specific_tags" in options else ():
            list(elements)  # pydicom interprets an element when it is first asked for
    return dataset


def elements_start(file: BinaryIO) -> int | None:
    """Return the byte at which a DICOM file's elements start; None where it is none.

    Without a preamble the first element must be one that DICOM files begin with, short, and of a type that
    exists.
    """
    from pydicom.values import converters

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
    from pydicom.filereader import read_dataset

    for is_implicit in (False, True):  # the second is against the standard; pydicom reads it, too
        file.seek(start)
        meta = read_dataset(file, is_implicit, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        with suppress(NotImplementedError):
            if "TransferSyntaxUID" in meta:
                return bool(meta.TransferSyntaxUID == DEFLATED)
    return False


def _found_syntax(dataset: FileDataset) -> UID:
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    is_implicit, is_little_endian = dataset.original_encoding
    if is_implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian


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
def rejecting(path: Path) -> Iterator[None]:
    """Turn what pydicom and SimpleITK raise for damaged files into a rejection."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    damaged = (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        OverflowError,
    )
    try:
        yield
    except RejectedError:
        raise
    except (*damaged, struct.error, zlib.error, BytesLengthException, InvalidDicomError) as error:
        said = str(error).strip().rsplit("\n", 1)[-1]  # SimpleITK begins with where in its sources
        detail = f"Cannot read '{path}' as DICOM: {said}. Copy or export it again."
        raise RejectedError("unreadable", detail) from error


if TYPE_CHECKING:  # takes 0.2 s to import; --help must not wait for it
    from pydicom import FileDataset

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


class SliceHeader(NamedTuple):
    """What a file says about one of its slices, in DICOM's world: to the left, to the back, to the head.

    Args:
        path: of the file.
        frame: index in the file.
        shape: rows and columns.
        pixel_mm: distance of rows and of columns.
        orientation: ``(2, 3)`` directions in which the column and the row index grow.
        position: ``(3,)`` of the first pixel in mm.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.
        name: the file in quotes, and the frame of those with several.
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


def read_headers(path: Path) -> list[SliceHeader]:
    """Read the header of each slice of a file, of Enhanced CT from its functional groups.

    Raises:
        RejectedError: if something is missing, contradicts itself, or is no CT in HU.
    """
    dataset = parse(path, path, stop_before_pixels=True, specific_tags=[*TAGS, *FRAME_TAGS])
    frames = frame_values(dataset, TAGS, path)
    stacks = {str(values.get("StackID") or "") for values in frames}
    if len(stacks) > 1:
        raise RejectedError(
            "multi-frame",
            f"'{path}' must hold one stack of slices, got {len(stacks)}. Export each as a series of its own.",
        )
    headers = []
    for i, values in enumerate(frames):
        name = f"'{path}'" if len(frames) == 1 else f"'{path}' frame {i + 1}"
        headers.append(_header(values, path, i, name))
    (bits,) = _numbers(frames[0], "BitsAllocated", 1, f"'{path}'")
    with rejecting(path):
        is_packed = dataset.file_meta.TransferSyntaxUID.is_compressed
        _check_size(path.stat().st_size * (MAX_INFLATION if is_packed else 1), headers, bits)
    return headers


def frame_values(dataset: FileDataset, names: Collection[str], path: Path) -> list[dict[str, Any]]:
    """Return the values of elements for each frame; a frame's own group decides over the shared one.

    Args:
        dataset: with the elements ``names`` and ``FRAME_TAGS``.
        names: of elements.
        path: of the file, for the message.

    Returns:
        Values of the elements that are there by name, for each frame.

    Raises:
        RejectedError: if there is not one functional group per frame.
    """
    with rejecting(path):
        num_frames = int(dataset.get("NumberOfFrames") or 1)
        shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())
        own = [[group] for group in dataset.get("PerFrameFunctionalGroupsSequence") or ()]
        if len(own or [[]]) != num_frames:
            raise RejectedError(
                "multi-frame",
                f"'{path}' must say where each of its {num_frames} frames lies, got {len(own)} items in "
                "PerFrameFunctionalGroupsSequence. Convert it to NIfTI.",
            )
        frames = []
        for groups in own or [[]]:
            items = [
                item
                for group in (*shared, *groups)
                for name in FUNCTIONAL_GROUPS
                for item in group.get(name) or ()
            ]
            frames.append({name: of[name].value for of in (dataset, *items) for name in names if name in of})
    return frames


def _header(values: Mapping[str, Any], path: Path, frame: int, name: str) -> SliceHeader:
    _check_pixels(values, name)
    slope, intercept = _rescale(values, name)
    (rows,), (columns,) = (_numbers(values, tag, 1, name) for tag in ("Rows", "Columns"))
    row_mm, column_mm = _numbers(values, "PixelSpacing", 2, name)
    if min(rows, columns, row_mm, column_mm) <= 0:
        raise RejectedError(
            "spacing",
            f"pixels must have a size, got {rows:g} x {columns:g} of {row_mm:g} x {column_mm:g} mm in {name}",
        )
    orientation = np.reshape(_numbers(values, "ImageOrientationPatient", 6, name), (2, 3))
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=1e-2):
        raise RejectedError(
            "geometry",
            f"ImageOrientationPatient must be perpendicular directions, got {orientation.tolist()} in {name}",
        )
    position = np.array(_numbers(values, "ImagePositionPatient", 3, name))
    shape = int(rows), int(columns)
    return SliceHeader(path, frame, shape, (row_mm, column_mm), orientation, position, slope, intercept, name)


def _check_pixels(values: Mapping[str, Any], name: str) -> None:
    photometric = str(values.get("PhotometricInterpretation") or "MONOCHROME2")
    if (values.get("SamplesPerPixel") or 1) != 1 or not photometric.startswith("MONOCHROME"):
        raise RejectedError("unreadable", f"pixels of {name} must be numbers, got colours")
    if values.get("BitsStored") is None or values.get("HighBit") is None:
        return
    (stored,), (high,) = (_numbers(values, tag, 1, name) for tag in ("BitsStored", "HighBit"))
    if high != stored - 1:
        raise RejectedError(
            "unreadable", f"HighBit must be BitsStored - 1, got {high:g} and {stored:g} in {name}"
        )


def _check_size(num_bytes: int, headers: Sequence[SliceHeader], bits: float) -> None:
    """Check that pixels fit into what their file can hold, before memory for them is asked for."""
    rows, columns = headers[0].shape
    if len(headers) * rows * columns * max(bits, 8) / 8 > num_bytes:
        frames = f"{len(headers)} x " if len(headers) > 1 else ""
        raise EOFError(f"it is too short for {frames}{rows} x {columns} pixels")


def _rescale(values: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Return slope and intercept, which a CT must state: SimpleITK takes 1 and 0 and so raw values for HU."""
    unit = str(values.get("RescaleType") or "").strip() or "HU"  # absent: HU, by the standard's CT module
    if unit.upper() != "HU":
        raise RejectedError("not in HU", f"RescaleType must be HU or absent, got '{unit}' in {name}")
    (slope,) = _numbers(values, "RescaleSlope", 1, name)
    (intercept,) = _numbers(values, "RescaleIntercept", 1, name)
    if slope <= 0:
        raise RejectedError("rescale", f"RescaleSlope must be positive, got {slope:g} in {name}")
    return slope, intercept


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
            why = ". SliceLocation cannot stand in for it: where it counts from and which way is not defined"
        raise RejectedError("metadata", f"{tag} must be {wanted}, got {value!r} in {name}{why}")
    return numbers
