"""Reads NIfTI files from front to back: header, then voxels as they are stored.

Shapes: X Y Z voxel axes as stored.
"""

import hashlib
import io
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from common.ct.geometry import SPACING_TOLERANCE, RejectedError, is_blank, shown_mm
from common.ct.names import suffix_of

Stream = io.BufferedIOBase | io.RawIOBase

CHUNK_BYTES = 2**20
"""Voxels that are read at once, at least a plane of them: what a core's cache holds."""

MAX_INFLATION = 1032
"""Deflate makes at most this of a byte, so a header that promises more is wrong. Source: zlib's manual."""

LABEL_TOLERANCE = 0.01
"""How far a label may be from a whole number. Our choice: a rescale in the header rounds by less."""

MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}

# isal's stubs take its exception for an instance.
DAMAGED: tuple[type[Exception], ...] = (
    *(OSError, EOFError, OverflowError, ImageFileError, HeaderDataError, isal_zlib.IsalError),  # type: ignore[assignment]
)
"""What reading a damaged file raises."""


class VolumeHeader(NamedTuple):
    """What the file of a volume says about its array.

    Args:
        shape: of the stored array, without trailing axes of length 1.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        slope: value = slope * stored + intercept; 1 where the header gives none.
        intercept: see ``slope``; 0 where the header gives none.
        is_blank: whether it states no geometry, see :func:`common.ct.geometry.is_blank`.
        contradiction: what its statements of the geometry disagree in; empty where they agree.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    is_blank: bool = False
    contradiction: str = ""

    @property
    def axcodes(self) -> str:
        """Where the stored axes point, such as ``LPS``; empty where the affine is not finite."""
        return axcodes(self.affine)


def axcodes(affine: np.ndarray) -> str:
    """Return where the axes of an affine point, such as ``LPS``; empty where it is not finite."""
    if not np.isfinite(affine).all():
        return ""
    return "".join(str(code) for code in nib.orientations.aff2axcodes(affine))


class VolumeFile(NamedTuple):
    """The file of a volume, open for reading.

    Args:
        header: of the file.
        planes: reads the voxels as they are stored, once: yields the index of the first plane of the last
            axis, and planes ``(..., N)`` in Fortran order; their memory is used again for the next ones.
        sha256: returns the checksum of the bytes; to be asked after the last of ``planes``.
    """

    header: VolumeHeader
    planes: Callable[[], Iterator[tuple[int, np.ndarray]]]
    sha256: Callable[[], str]

    def labels(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Read the voxels as labels: rescaled as the header says, and whole numbers.

        Args:
            name: of the file, for the message.

        Yields:
            As ``planes``.

        Raises:
            RejectedError: if a label is more than .01 from a whole number.
        """
        slope, intercept = self.header.slope, self.header.intercept
        for first, planes in self.planes():
            labels = planes if (slope, intercept) == (1, 0) else planes * np.float64(slope) + intercept
            if labels.dtype.kind == "f":
                whole = np.rint(labels)
                if not (np.abs(labels - whole) <= LABEL_TOLERANCE).all():
                    raise RejectedError("mask", f"labels of '{name}' must be whole numbers, got fractions")
                labels = whole
            yield first, labels


@contextmanager
def open_nifti(path: Path) -> Iterator[VolumeFile]:
    """Open a file for reading, whatever its suffix says: gzipped or not, NIfTI-1 or 2, of either byte order.

    Args:
        path: ``.nii`` or ``.nii.gz``; or the ``.hdr`` of a pair, whose ``.img`` lies beside it.

    Yields:
        The file, its header read.

    Raises:
        RejectedError: here or in the reading if the file is truncated, damaged, no NIfTI file or cannot be
            read, or its voxels are no numbers.
    """
    try:
        with ExitStack() as stack:
            digest = hashlib.sha256()
            stream, size, most_bytes = _open(path, digest, stack)
            stated, pixdim = _read_header(stream, path)
            start = stated.sizeof_hdr
            if stated["magic"].item() == stated.pair_magic:
                _read_on(stream)
                stream, size, most_bytes = _open(_image_of(path), digest, stack)
                start = 0
            header, dtype, offset = _described(stated, pixdim)
            if offset < start:
                raise ImageFileError(f"voxels from byte {offset} on, inside of the header")
            if offset + math.prod(header.shape) * dtype.itemsize > most_bytes:
                raise EOFError(f"{size} bytes for an array of shape {header.shape} of {dtype}")
            for skipped in range(start, offset, CHUNK_BYTES):
                _read(stream, min(CHUNK_BYTES, offset - skipped))
            if dtype.kind not in "iuf":
                raise RejectedError("unreadable", f"voxels of '{path.name}' must be numbers, got {dtype}")
            yield VolumeFile(header, partial(_planes, stream, header.shape, dtype), digest.hexdigest)
    except DAMAGED as error:
        raise RejectedError(
            "unreadable", f"Cannot read '{path.name}' as NIfTI: {error}. Copy or download it again."
        ) from error


def _open(path: Path, digest: "hashlib._Hash", stack: ExitStack) -> tuple[Stream, int, int]:
    """Open a file to be hashed as it is read: the stream, the file's size, and most bytes it can hold."""
    raw = stack.enter_context(path.open("rb", buffering=0))
    is_gzipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    source = _HashingFile(raw, digest)
    size = os.fstat(raw.fileno()).st_size
    if is_gzipped:
        return igzip.IGzipFile(fileobj=source), size, size * MAX_INFLATION
    return source, size, size


def _image_of(path: Path) -> Path:
    """Return the file with the voxels of a header; its suffix may be written in another case."""
    stem = path.name[: len(path.name) - len(suffix_of(path.name))].lower()
    images = {f"{stem}.img", f"{stem}.img.gz"}
    found = [other for other in sorted(path.parent.iterdir()) if other.name.lower() in images]
    if len(found) != 1:
        raise ImageFileError(f"{len(found)} files '{stem}.img' beside it")
    return found[0]


def _planes(stream: Stream, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Read voxels; reads on to the end of the file, where a gzipped one has its checksum."""
    *plane, num_planes = shape
    plane_bytes = math.prod(plane) * dtype.itemsize
    at_once = min(num_planes, max(1, CHUNK_BYTES // plane_bytes))
    buffer = memoryview(bytearray(at_once * plane_bytes))
    for start in range(0, num_planes, at_once):
        count = min(at_once, num_planes - start)
        chunk = buffer[: count * plane_bytes]
        _read_into(stream, chunk)
        yield start, np.frombuffer(chunk, dtype).reshape((*plane, count), order="F")
    _read_on(stream)


class _HashingFile(io.RawIOBase):
    """A file whose bytes are hashed as they are read.

    Args:
        raw: the file.
        digest: takes the bytes.
    """

    def __init__(self, raw: io.RawIOBase, digest: "hashlib._Hash") -> None:
        self._raw = raw
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer is 3.12
        count = self._raw.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count


def _read_header(stream: Stream, path: Path) -> tuple[nib.nifti1.Nifti1Header, np.ndarray]:
    """Read the header, and the spacing in its pixdim, where nibabel would put 1 for 0."""
    start = _read(stream, 4)
    sizes = struct.unpack("<i", start) + struct.unpack(">i", start)
    if 348 not in sizes and 540 not in sizes:
        raise ImageFileError(f"it begins with {start!r}")
    kind = nib.nifti2.Nifti2Header if 540 in sizes else nib.nifti1.Nifti1Header
    block = start + _read(stream, kind.sizeof_hdr - 4)
    if kind.may_contain_header(block):
        return kind(block), kind(block, check=False)["pixdim"][1:4].astype(float)
    if 348 in sizes and not block[344:].strip(b"\0"):
        raise RejectedError(
            "geometry", f"'{path.name}' is in Analyze format, which does not say left from right. Convert it."
        )
    raise ImageFileError(f"it begins with {block[:8]!r}")


def _described(stated: nib.nifti1.Nifti1Header, pixdim: np.ndarray) -> tuple[VolumeHeader, np.dtype, int]:
    """Put a header in our words, with the type of the voxels and the byte they begin at."""
    try:
        dtype, shape = stated.get_data_dtype(), tuple(int(size) for size in stated.get_data_shape())
        unit, _ = stated.get_xyzt_units()
        to_mm = np.diag([*3 * [MM_PER_UNIT[unit]], 1.0])
        affine = to_mm @ np.asarray(stated.get_best_affine(), np.float64)
        slope, intercept = stated.get_slope_inter()
        offset = int(stated.get_data_offset())
        contradiction = _contradiction(stated, to_mm, np.abs(pixdim))
    except (ValueError, OverflowError, KeyError) as error:  # what it says makes no affine, or no number
        raise ImageFileError(f"a header that cannot be: {error}") from error
    if not shape or min(shape) < 1:
        raise ImageFileError(f"an array of shape {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    is_unset = not (stated["sform_code"] or stated["qform_code"])
    header = VolumeHeader(
        shape=shape,
        affine=affine,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        is_blank=bool(is_unset or is_blank(shape, affine)),
        contradiction=contradiction,
    )
    return header, dtype, offset


def _contradiction(stated: nib.nifti1.Nifti1Header, to_mm: np.ndarray, pixdim: np.ndarray) -> str:
    """Compare sform, which is believed, with qform and pixdim where the header states them as well."""
    sform, qform = stated.get_sform(coded=True)[0], stated.get_qform(coded=True)[0]
    if sform is None:
        return ""
    own = np.linalg.norm(sform[:3, :3], axis=0)
    if (pixdim > 0).all() and (np.abs(own - pixdim) > SPACING_TOLERANCE * np.maximum(own, pixdim)).any():
        mm = to_mm[0, 0]
        return f"a spacing of {shown_mm(own * mm)} mm in sform and of {shown_mm(pixdim * mm)} mm in pixdim"
    if qform is not None and axcodes(sform) != axcodes(qform):
        return f"the axes {axcodes(sform)} in sform and {axcodes(qform)} in qform"
    return ""


def _read_on(stream: Stream) -> None:
    while stream.read(CHUNK_BYTES):
        pass


def _read(stream: Stream, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    _read_into(stream, memoryview(buffer))
    return bytes(buffer)


def _read_into(stream: Stream, buffer: memoryview) -> None:
    """Fill a buffer; a stream may give less than is asked for."""
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise EOFError(f"an end after {done} of {len(buffer)} bytes")
        done += count
