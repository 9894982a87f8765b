"""Reads NIfTI files as they are stored: integers, affine, rescale. Nothing is scaled here.

Shapes: X Y Z voxel axes as stored.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from common.data.slice_codec import STORED_HU_RANGE
from common.transforms.orientation import axial_slices, voxel_axes
from data_prep.rejection import RejectedError

SUFFIXES = (".nii.gz", ".nii")


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

    Args:
        folder: searched with its sub-folders.

    Returns:
        Volume to its files; more than one file is a mistake of the dataset.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.nii*"), key=lambda path: (path.name, str(path))):
        if path.name.endswith(SUFFIXES) and path.is_file():
            found.setdefault(volume_of(path), []).append(path)
    return found


def only_file(files: Sequence[Path], what: str) -> Path:
    """Return the one file of a volume.

    Args:
        files: that have the volume's name.
        what: they are, for the message.

    Raises:
        RejectedError: if there are several: nothing says which is right.
    """
    if len(files) > 1:
        raise RejectedError("duplicate", f"{what} must be one file, got '{files[0]}' and '{files[1]}'")
    return files[0]


def read_header(path: Path) -> NiftiHeader:
    """Read what a file says about its array, without the array.

    Args:
        path: ``.nii`` or ``.nii.gz``.

    Returns:
        The header.

    Raises:
        RejectedError: if the file is no NIfTI file.
    """
    try:
        return _header(_load(path))
    except (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise RejectedError("unreadable", f"'{path.name}' must be a NIfTI file, got {error}") from error


def read_stored(path: Path) -> tuple[np.ndarray, NiftiHeader]:
    """Read the array as it is stored, and check that the file is whole.

    A gzipped file is decompressed to its end, where its checksum is.

    Args:
        path: ``.nii`` or ``.nii.gz``.

    Returns:
        The array, of the type and in the order of the file, and its header.

    Raises:
        RejectedError: if the file is truncated, damaged or no NIfTI file, or its voxels are no numbers.
    """
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        image = type(_load(path)).from_bytes(content)
        header = _header(image)
        num_bytes = math.prod(header.shape) * image.get_data_dtype().itemsize
        if num_bytes > len(content):
            raise EOFError(f"{len(content)} bytes for an array of {num_bytes}")
        stored = np.asanyarray(_proxy(image).get_unscaled())
    except (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise RejectedError("unreadable", f"'{path.name}' must be a whole NIfTI file, got {error}") from error
    if stored.dtype.kind not in "iuf":
        raise RejectedError("unreadable", f"voxels of '{path.name}' must be numbers, got {stored.dtype}")
    return stored, header


def canonical_hu(
    stored: np.ndarray, affine: np.ndarray, slope: float, intercept: float
) -> tuple[np.ndarray, tuple[float, float, float], float]:
    """Turn a stored array into canonical slices in HU as shards keep them.

    Args:
        stored: array of the file.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.

    Shape:
        Input ``(X, Y, Z)``. Output ``(Z, H, W)``.

    Returns:
        int16 HU rounded and clipped to ``STORED_HU_RANGE``, the spacing in mm as (x, y, z), and the lowest HU
        before the clip.

    Raises:
        RejectedError: if a voxel is not finite, or the affine is not that of an axial scan.

    Example:
        >>> affine = np.diag([-0.7, -0.7, 2, 1])
        >>> hu, spacing_mm, lowest = canonical_hu(np.full((2, 3, 5), 24), affine, 1, -1024)
        >>> hu.shape, int(hu[0, 0, 0]), lowest
        ((5, 3, 2), -1000, -1000.0)
    """
    slices, spacing_mm = canonical_slices(stored, affine)
    low, high = STORED_HU_RANGE
    hu = np.empty(slices.shape, np.int16)
    lowest = np.inf
    is_hu = stored.dtype.kind in "iu" and (slope, intercept) == (1, 0)
    for z, plane in enumerate(slices):
        values = plane if is_hu else plane * np.float64(slope) + intercept
        plane_lowest = float(values.min())
        if not np.isfinite(plane_lowest) or not np.isfinite(values.max()):
            raise RejectedError(
                "non-finite voxels", f"voxels must be finite, got NaN or infinity in slice {z}"
            )
        lowest = min(lowest, plane_lowest)
        hu[z] = np.clip(values if is_hu else np.rint(values), low, high)
    return hu, spacing_mm, lowest


def canonical_slices(stored: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Do as ``axial_slices``, with an array or affine it refuses as a reason to reject the volume."""
    try:
        return axial_slices(stored, affine)
    except ValueError as error:
        raise RejectedError("geometry", str(error)) from error


def canonical_shape(header: NiftiHeader, affine: np.ndarray) -> tuple[int, int, int]:
    """Return the shape the canonical slices of a file will have, from its header alone.

    Args:
        header: of the file.
        affine: ``(4, 4)``; not always the header's.

    Returns:
        Slices, height and width.

    Raises:
        RejectedError: if the array is not 3-D, or the affine is not that of an axial scan.
    """
    if len(header.shape) != 3:
        raise RejectedError("geometry", f"volume must have 3 axes, got shape {header.shape}")
    try:
        (x, y, z), _, _ = voxel_axes(affine)
    except ValueError as error:
        raise RejectedError("geometry", str(error)) from error
    return header.shape[z], header.shape[y], header.shape[x]


def _load(path: Path) -> nib.nifti1.Nifti1Image:
    """Open a file; reads its header only."""
    image = nib.loadsave.load(path)
    if not isinstance(image, nib.nifti1.Nifti1Image):  # NIfTI-2 is a subclass
        raise ImageFileError(f"a {type(image).__name__}")
    return image


def _proxy(image: nib.nifti1.Nifti1Image) -> Any:  # noqa: ANN401 (nibabel types it as a bare array)
    return image.dataobj


def _header(image: nib.nifti1.Nifti1Image) -> NiftiHeader:
    proxy = _proxy(image)
    shape = tuple(int(size) for size in image.shape)
    if min(shape) < 1:
        raise ImageFileError(f"an array of shape {shape}")
    is_unset = not (image.header["sform_code"] or image.header["qform_code"])
    affine = np.asarray(image.affine, np.float64)
    return NiftiHeader(
        shape=shape,
        affine=affine,
        slope=float(proxy.slope),
        intercept=float(proxy.inter),
        is_blank=bool(is_unset or np.array_equal(affine, np.eye(4))),
    )
