"""Finds NIfTI files and reads them from front to back: header, then voxels as they are stored.

Shapes: X Y Z voxel axes as stored.
"""

import hashlib
import io
import logging
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from common.ct.rejection import RejectedError

logger = logging.getLogger(__name__)

Stream = io.BufferedIOBase | io.RawIOBase

SUFFIXES = (".nii.gz", ".nii")

CHUNK_BYTES = 2**20
"""Voxels that are read at once, at least a plane of them: what a core's cache holds."""

MAX_INFLATION = 1032
"""Deflate makes at most this of a byte, so a header that promises more is wrong. Source: zlib's manual."""

# isal's stubs take its exception for an instance.
DAMAGED: tuple[type[Exception], ...] = (
    *(OSError, EOFError, ImageFileError, HeaderDataError, isal_zlib.IsalError),  # type: ignore[assignment]
)
"""What reading a damaged file raises."""


class NiftiHeader(NamedTuple):
    """What a NIfTI file says about its array.

    Args:
        shape: of the stored array.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        slope: value = slope * stored + intercept; 1 where the header gives none.
        intercept: see ``slope``; 0 where the header gives none.
        is_blank: whether it states no geometry: no coordinate system at all, or the identity.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    slope: float
    intercept: float
    is_blank: bool

    @property
    def axcodes(self) -> str:
        """Where the stored axes point, such as ``LPS``; empty where the affine is not finite."""
        if not np.isfinite(self.affine).all():
            return ""
        return "".join(str(code) for code in nib.orientations.aff2axcodes(self.affine))


def volume_of(path: Path) -> str:
    """Return the name of the volume a file holds: its own, without suffix.

    Example:
        >>> volume_of(Path("train_fixed/train_1_a_1.nii.gz"))
        'train_1_a_1'
    """
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    raise ValueError(f"path must end in one of {SUFFIXES}, got '{path}'.")


def find_nifti(folder: Path) -> dict[str, list[Path]]:
    """List the NIfTI files under a folder by volume, in the order of their names.

    Whatever has the name of a NIfTI file is listed, be it a folder or a link that leads nowhere: reading it
    says what is wrong. A folder that cannot be searched is listed under its own name in place of what it may
    hold.

    Args:
        folder: searched with its sub-folders, not through links to folders, of which a warning tells.

    Returns:
        Volume to its files; more than one file is a mistake of the dataset.
    """
    closed: list[OSError] = []
    paths = []
    for place, folders, files in os.walk(folder, onerror=closed.append):
        named = [name for name in folders if name.endswith(SUFFIXES)]
        folders[:] = [name for name in folders if name not in named]
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                logger.warning("'%s' is a link to a folder and is not searched.", os.path.join(place, name))
        paths += [Path(place, name) for name in (*named, *files) if name.endswith(SUFFIXES)]
    for error in closed:
        logger.warning("A folder cannot be searched: %s", error)
        paths.append(Path(error.filename))
    found: dict[str, list[Path]] = {}
    for path in sorted(paths, key=lambda path: (path.name, str(path))):
        volume = volume_of(path) if path.name.endswith(SUFFIXES) else path.name
        found.setdefault(volume, []).append(path)
    return found


def only_file(files: Sequence[Path], what: str) -> Path:
    """Return the one file of a volume.

    Args:
        files: that have the volume's name.
        what: they are, for the message.

    Raises:
        RejectedError: if there are several, as nothing says which is right, or it is a folder.
    """
    if len(files) > 1:
        raise RejectedError("duplicate", f"{what} must be one file, got '{files[0]}' and '{files[1]}'")
    if os.path.isdir(files[0]):
        raise RejectedError(
            "unreadable", f"{what} must be a file that can be read, got the folder '{files[0]}'"
        )
    return files[0]


def read_header(path: Path) -> NiftiHeader:
    """Read what a file says about its array, without the array.

    Args:
        path: ``.nii`` or ``.nii.gz``.

    Returns:
        The header.

    Raises:
        RejectedError: if the file is no NIfTI file, or shorter than its header says.
    """
    with open_nifti(path) as file:
        return file.header


class NiftiFile:
    """A NIfTI file that is being read; made by ``open_nifti``.

    Args:
        header: of the file.
        dtype: of its voxels.
        stream: stands at the first voxel.
        source: of the stream, hashed.
    """

    def __init__(self, header: NiftiHeader, dtype: np.dtype, stream: Stream, source: "_HashingFile") -> None:
        self.header = header
        self.dtype = dtype
        self._stream = stream
        self._source = source

    def planes(self) -> Iterator[tuple[int, np.ndarray]]:
        """Read the voxels as they are stored, a few planes of the last axis at a time, once.

        Reads on to the end of the file, where a gzipped one has its checksum.

        Yields:
            The index of the first, and planes ``(..., N)`` in Fortran order; their memory is used again for
            the next ones.
        """
        *plane, num_planes = self.header.shape
        plane_bytes = math.prod(plane) * self.dtype.itemsize
        at_once = min(num_planes, max(1, CHUNK_BYTES // plane_bytes))
        buffer = memoryview(bytearray(at_once * plane_bytes))
        for start in range(0, num_planes, at_once):
            count = min(at_once, num_planes - start)
            chunk = buffer[: count * plane_bytes]
            _read_into(self._stream, chunk)
            yield start, np.frombuffer(chunk, self.dtype).reshape((*plane, count), order="F")
        while self._stream.read(CHUNK_BYTES):
            pass

    def sha256(self) -> str:
        """Return the checksum of the file's bytes; to be asked after the last of ``planes``."""
        return self._source.digest.hexdigest()


@contextmanager
def open_nifti(path: Path) -> Iterator[NiftiFile]:
    """Open a file for reading, gzipped or not; NIfTI-1 or 2, of either byte order.

    Args:
        path: ``.nii`` or ``.nii.gz``.

    Yields:
        The file, its header read.

    Raises:
        RejectedError: here or in the reading if the file is truncated, damaged, no NIfTI file or cannot be
            read, or its voxels are no numbers.
    """
    try:
        with path.open("rb", buffering=0) as raw:
            source = _HashingFile(raw)
            is_gzipped = path.name.lower().endswith(".gz")
            stream = igzip.IGzipFile(fileobj=source) if is_gzipped else source
            size = os.fstat(raw.fileno()).st_size
            header, dtype = _read_header(stream, size, size * (MAX_INFLATION if is_gzipped else 1))
            if dtype.kind not in "iuf":
                raise RejectedError("unreadable", f"voxels of '{path.name}' must be numbers, got {dtype}")
            yield NiftiFile(header, dtype, stream, source)
    except DAMAGED as error:
        raise RejectedError(
            "unreadable",
            f"'{path.name}' must be a whole NIfTI file, got {error}. Copy or download it again.",
        ) from error


class _HashingFile(io.RawIOBase):
    """A file whose bytes are hashed as they are read.

    Args:
        raw: the file.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer is 3.12
        count = self._raw.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        return count


def _read_header(stream: Stream, size: int, most_bytes: int) -> tuple[NiftiHeader, np.dtype]:
    """Read header and type; leaves the stream, which can hold ``most_bytes``, at the first voxel."""
    start = _read(stream, 4)
    sizes = struct.unpack("<i", start) + struct.unpack(">i", start)
    kind = nib.nifti2.Nifti2Header if 540 in sizes else nib.nifti1.Nifti1Header
    block = start + _read(stream, kind.sizeof_hdr - 4)
    if not kind.may_contain_header(block):
        raise ImageFileError(f"a file that begins with {block[:8]!r}")
    try:
        stated = kind(block)
        dtype, shape = stated.get_data_dtype(), tuple(int(size) for size in stated.get_data_shape())
        affine = np.asarray(stated.get_best_affine(), np.float64)
        slope, intercept = stated.get_slope_inter()
        offset = int(stated.get_data_offset())
    except (ValueError, OverflowError) as error:  # what the header says makes no affine, or no number
        raise ImageFileError(f"a header that cannot be: {error}") from error
    if stated["magic"].item() != stated.single_magic or offset < len(block):
        raise ImageFileError(
            f"a header without voxels behind it: {stated['magic'].item()!r}, offset {offset}"
        )
    if not shape or min(shape) < 1:
        raise ImageFileError(f"an array of shape {shape}")
    if offset + math.prod(shape) * dtype.itemsize > most_bytes:
        raise EOFError(f"{size} bytes for an array of shape {shape} of {dtype}")
    for skipped in range(len(block), offset, CHUNK_BYTES):
        _read(stream, min(CHUNK_BYTES, offset - skipped))
    is_unset = not (stated["sform_code"] or stated["qform_code"])
    header = NiftiHeader(
        shape=shape,
        affine=affine,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        is_blank=bool(is_unset or np.array_equal(affine, np.eye(4))),
    )
    return header, dtype


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
