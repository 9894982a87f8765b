"""Reads NIfTI files from front to back, and makes a CT of an open file so that it is rescaled exactly once.

CT-RATE's NIfTI comes in two forms, raw and in HU; MetaImage and NRRD are read as files in HU.
Shapes: X Y Z voxel axes as stored.
"""

import hashlib
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from common.ct.geometry import (
    CT,
    SPACING_TOLERANCE,
    Grid,
    HUValues,
    axcodes,
    axial_slices,
    canonical_axes,
    canonical_shape,
    check_spacing,
    is_blank,
    rejecting,
    shown_mm,
    store_hu,
)
from common.ct.rejection import RejectedError

Stream = BufferedReader | igzip.IGzipFile

CHUNK_BYTES = 2**20
"""Voxels that are read at once, at least a plane of them: what a core's cache holds."""

MAX_INFLATION = 1032
"""Bytes that deflate makes of one at most: a header that promises more is wrong. Source: zlib's manual."""

LABEL_TOLERANCE = 0.01
"""How far a label may be from a whole number. Our choice: a rescale in the header rounds by less."""

MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1000.0, "micron": 0.001}

# isal's stubs take its exception for an instance.
DAMAGED: tuple[type[Exception], ...] = (
    *(OSError, EOFError, OverflowError, ImageFileError, HeaderDataError, isal_zlib.IsalError),  # type: ignore[assignment]
)
"""What reading a damaged file raises."""


class VolumeHeader(NamedTuple):
    """What a file says about its array.

    Args:
        shape: shape of the stored array, without trailing axes of length 1.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        slope: value = slope * stored + intercept; 1 where the header gives none.
        intercept: see ``slope``; 0 where the header gives none.
        is_blank: whether it states no geometry, see :func:`common.ct.geometry.is_blank`.
        contradiction: how its statements of the geometry disagree; empty where they agree.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0
    is_blank: bool = False
    contradiction: str = ""


class VolumeFile(NamedTuple):
    """A file open for reading.

    Args:
        header: what it says about its array.
        planes: reads the voxels as they are stored, once: yields the index of the first plane of the last
            axis, and planes ``(..., N)`` in Fortran order.
        paths: the file, and the one with its voxels if that is another.
    """

    header: VolumeHeader
    planes: Callable[[], Iterator[tuple[int, np.ndarray]]]
    paths: Sequence[Path]

    def labels(self) -> Iterator[tuple[int, np.ndarray]]:
        """Read the voxels as labels, rescaled as the header says; yields as ``planes``.

        Raises:
            RejectedError: if a label is more than 0.01 from a whole number.
        """
        slope, intercept = self.header.slope, self.header.intercept
        for first, planes in self.planes():
            labels = planes if (slope, intercept) == (1, 0) else planes * np.float64(slope) + intercept
            if labels.dtype.kind == "f":
                whole = np.rint(labels)
                if not (np.abs(labels - whole) <= LABEL_TOLERANCE).all():
                    name = self.paths[0].name
                    raise RejectedError("mask", f"labels of '{name}' must be whole numbers, got fractions")
                labels = whole
            yield first, labels

    def sha256(self) -> str:
        """Return the checksum of the bytes, of two files one after another."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


class Rescale(NamedTuple):
    """What CT-RATE's metadata says about a raw volume.

    Args:
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.
        spacing_mm: as (x, y, z).
    """

    slope: float
    intercept: float
    spacing_mm: tuple[float, float, float]


@contextmanager
def open_nifti(path: Path) -> Iterator[VolumeFile]:
    """Open a file for reading, whatever its suffix says: gzipped or not, NIfTI-1 or 2, of either byte order.

    Args:
        path: ``.nii`` or ``.nii.gz``; or the ``.hdr`` of a pair, whose ``.img`` lies beside it.

    Raises:
        RejectedError: now or while reading, if the file is truncated, damaged, no NIfTI file or cannot be
            read, or its voxels are no numbers.
    """
    with rejecting(f"'{path.name}' as NIfTI", DAMAGED), ExitStack() as stack:
        paths = [path]
        stream, size, most_bytes = _open(path, stack)
        stated, pixdim = _read_header(stream, path)
        start = stated.sizeof_hdr
        if stated["magic"].item() == stated.pair_magic:
            paths.append(_image_of(path))
            stream, size, most_bytes = _open(paths[1], stack)
            start = 0
        header, dtype, offset = _described(stated, pixdim)
        if offset < start:
            raise ImageFileError(f"voxels from byte {offset} on, inside the header")
        if offset + math.prod(header.shape) * dtype.itemsize > most_bytes:
            raise EOFError(f"{size} bytes for an array of shape {header.shape} of {dtype}")
        for skipped in range(start, offset, CHUNK_BYTES):
            _read(stream, min(CHUNK_BYTES, offset - skipped))
        if dtype.kind not in "iuf":
            raise RejectedError("unreadable", f"voxels of '{path.name}' must be numbers, got {dtype}")
        yield VolumeFile(header, partial(_planes, stream, header.shape, dtype), paths)


def _open(path: Path, stack: ExitStack) -> tuple[Stream, int, int]:
    """Open a file: the stream, the file's size, and the most bytes it can hold."""
    file = stack.enter_context(path.open("rb"))
    size = os.fstat(file.fileno()).st_size
    if file.peek(2)[:2] == b"\x1f\x8b":
        return igzip.IGzipFile(fileobj=file), size, size * MAX_INFLATION
    return file, size, size


def _read(stream: Stream, num_bytes: int) -> bytes:
    content = stream.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError(f"an end after {len(content)} of {num_bytes} bytes")
    return content


def _image_of(path: Path) -> Path:
    """Return the file with the voxels of a header; its suffix may be written in another case."""
    stem = re.sub(r"\.(hdr|nii)(\.gz)?$", "", path.name.lower())
    images = {f"{stem}.img", f"{stem}.img.gz"}
    found = [other for other in sorted(path.parent.iterdir()) if other.name.lower() in images]
    if len(found) != 1:
        raise ImageFileError(f"{len(found)} files '{stem}.img' beside it")
    return found[0]


def _planes(stream: Stream, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Read voxels, then on to the end of the file, where a gzipped one has its checksum."""
    *plane, num_planes = shape
    plane_bytes = math.prod(plane) * dtype.itemsize
    at_once = max(1, CHUNK_BYTES // plane_bytes)
    for start in range(0, num_planes, at_once):
        count = min(at_once, num_planes - start)
        chunk = _read(stream, count * plane_bytes)
        yield start, np.frombuffer(chunk, dtype).reshape((*plane, count), order="F")
    while stream.read(CHUNK_BYTES):
        pass


def _read_header(stream: Stream, path: Path) -> tuple[nib.nifti1.Nifti1Header, np.ndarray]:
    """Read the header, and the spacing in its pixdim, where nibabel would put 1 for 0."""
    start = _read(stream, 4)
    sizes = struct.unpack("<i", start) + struct.unpack(">i", start)
    if 348 not in sizes and 540 not in sizes:
        raise ImageFileError(f"it begins with {start!r}")
    kind: Any = nib.nifti2.Nifti2Header if 540 in sizes else nib.nifti1.Nifti1Header
    block = start + _read(stream, kind.sizeof_hdr - 4)
    if kind.may_contain_header(block):
        return kind(block), kind(block, check=False)["pixdim"][1:4].astype(float)
    if 348 in sizes and not block[344:].strip(b"\0"):
        detail = f"'{path.name}' is in Analyze format, which does not say left from right. Convert it."
        raise RejectedError("geometry", detail)
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
    shape = without_trailing_ones(shape)
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


def without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the last axes of length 1 behind the third."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _contradiction(stated: nib.nifti1.Nifti1Header, to_mm: np.ndarray, pixdim: np.ndarray) -> str:
    """Compare sform, which is believed, with qform and pixdim where the header states them as well."""
    sform, qform = stated.get_sform(coded=True)[0], stated.get_qform(coded=True)[0]
    if sform is None:
        return ""
    spacing = np.linalg.norm(sform[:3, :3], axis=0)
    tolerance = SPACING_TOLERANCE * np.maximum(spacing, pixdim)
    if (pixdim > 0).all() and (np.abs(spacing - pixdim) > tolerance).any():
        mm = to_mm[0, 0]
        return (
            f"a spacing of {shown_mm(spacing * mm)} mm in sform and of {shown_mm(pixdim * mm)} mm in pixdim"
        )
    if qform is not None and axcodes(sform) != axcodes(qform):
        return f"the axes {axcodes(sform)} in sform and {axcodes(qform)} in qform"
    return ""


def read_ct(file: VolumeFile, form: str = "v2", rescale: Rescale | None = None) -> CT:
    """Read a volume a few planes at a time: neither the file nor its values are ever in memory as a whole.

    ``form`` and ``rescale`` are those of ``grid_of``.

    Raises:
        RejectedError: as ``grid_of``, and if the file is damaged or a voxel is not finite.
    """
    grid, slope, intercept = grid_of(file.header, form, rescale)
    stored, kept = np.empty(grid.shape, np.int16, order="F"), HUValues()
    for first, planes in file.planes():
        end = first + planes.shape[-1]
        where = f"planes {first} to {end - 1} as stored"
        store_hu(planes, slope, intercept, out=stored[..., first:end], kept=kept, where=where)
    hu, spacing_mm = axial_slices(stored, grid.affine)
    return CT(hu, spacing_mm, grid, file.sha256(), kept)


def grid_of(
    header: VolumeHeader, form: str = "v2", rescale: Rescale | None = None
) -> tuple[Grid, float, float]:
    """Settle on which grid a volume lies, and by which slope and intercept it becomes HU.

    Args:
        header: what its file says.
        form: ``v2`` is in HU with a header that says so; ``v1`` is raw, stored as LPS with a blank header,
            and ``rescale`` says the rest; ``auto`` is v1 if the header is blank, else v2.
        rescale: what the metadata says; needed for v1.

    Raises:
        RejectedError: if header, form and metadata contradict one another, or they are not those of a CT.
    """
    if len(header.shape) != 3:
        detail = f"volume must have 3 axes, got shape {header.shape}. Save one volume per file."
        raise RejectedError("geometry", detail)
    shape = header.shape[0], header.shape[1], header.shape[2]
    if form == "v1" or (form == "auto" and header.is_blank):
        raw = _raw_rescale(header, rescale)
        check_spacing(raw.spacing_mm)  # of the table: an affine would not show a sign
        affine = np.diag([-raw.spacing_mm[0], -raw.spacing_mm[1], raw.spacing_mm[2], 1.0])
        grid = Grid(shape, affine, has_origin=False)
        canonical_shape(grid)
        return grid, raw.slope, raw.intercept
    if header.is_blank:
        what = "no orientation, or voxels of 1 mm at the origin, as tools write that know none"
        detail = f"a volume in HU must state its geometry, got a blank header: {what}"
        raise RejectedError("v1 or v2", f"{detail}. If 1 mm is right, set the true origin.")
    if header.contradiction:
        detail = f"header must state one geometry, got {header.contradiction}. Correct the one that is wrong."
        raise RejectedError("geometry", detail)
    grid = Grid(shape, header.affine)
    canonical_shape(grid)
    if rescale is not None:
        _, _, spacing_mm = canonical_axes(grid.affine)
        pairs = zip(spacing_mm, rescale.spacing_mm, strict=True)
        if any(math.isfinite(said) and abs(mm - said) > SPACING_TOLERANCE * mm for mm, said in pairs):
            in_header, in_table = shown_mm(spacing_mm), shown_mm(rescale.spacing_mm)
            shown = f"{in_header} mm in the header and {in_table} mm in the metadata"
            raise RejectedError("spacing", f"header and metadata must state one spacing, got {shown}")
    return grid, header.slope, header.intercept


def _raw_rescale(header: VolumeHeader, rescale: Rescale | None) -> Rescale:
    if not header.is_blank or (header.slope, header.intercept) != (1, 0):
        axes = axcodes(header.affine)
        detail = f"a raw volume must have a blank header, got one with axes {axes} or a rescale"
        raise RejectedError("v1 or v2", detail)
    if rescale is None:
        detail = "a raw volume must have a row in the metadata, got a blank header alone"
        raise RejectedError("v1 or v2", detail)
    slope, intercept, _ = rescale
    if not (math.isfinite(slope) and slope > 0 and math.isfinite(intercept)):
        detail = f"slope and intercept must be numbers, got {slope:g} and {intercept:g}"
        raise RejectedError("rescale", detail)
    return rescale
