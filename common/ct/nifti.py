"""Reads a CT from the file of a volume, so that nothing is rescaled twice or not at all.

NIfTI comes in the two forms of CT-RATE; MetaImage and NRRD are read as the one that is in HU.
"""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.ct.geometry import (
    SPACING_TOLERANCE,
    HUValues,
    RejectedError,
    StoredCT,
    StoredGrid,
    axial_slices,
    canonical_shape,
    check_spacing,
    shown_mm,
    store_hu,
    voxel_axes,
)
from common.ct.itk import open_itk
from common.ct.names import ITK_SUFFIXES, suffix_of
from common.ct.nifti_file import VolumeFile, VolumeHeader, open_nifti


def open_volume(path: Path) -> AbstractContextManager[VolumeFile]:
    """Open a file for reading.

    Args:
        path: NIfTI (``.nii``, ``.nii.gz``, ``.hdr`` with ``.img``), MetaImage or NRRD, suffixes in any case.

    Raises:
        RejectedError: as ``open_nifti`` and ``open_itk``.
    """
    return open_itk(path) if suffix_of(path.name, ITK_SUFFIXES) else open_nifti(path)


def read_header(path: Path) -> VolumeHeader:
    """Read what a file says about its array, without the array; arguments and errors of ``open_volume``."""
    with open_volume(path) as file:
        return file.header


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


class Geometry(NamedTuple):
    """How a stored array becomes HU in the world.

    Args:
        form: ``v1`` or ``v2``.
        grid: on which it is stored.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.
    """

    form: str
    grid: StoredGrid
    slope: float
    intercept: float


def read_grid(path: Path, form: str = "v2", rescale: Rescale | None = None) -> StoredGrid:
    """Read on which grid a volume is stored, from its header and the metadata.

    Args:
        path: see ``open_volume``.
        form: ``v2`` is in HU with a header that says so; ``v1`` is raw with a blank header, and ``rescale``
            says the rest; ``auto`` is v1 iff the header is blank.
        rescale: what the metadata says; needed for v1.

    Returns:
        The grid.

    Raises:
        RejectedError: if header, form and metadata contradict one another, or they are not those of a CT.
    """
    return geometry(read_header(path), form, rescale).grid


def read_ct(path: Path, form: str = "v2", rescale: Rescale | None = None) -> StoredCT:
    """Read a volume, a few planes at a time: neither the file nor its values are ever in memory as a whole.

    Args:
        path: see ``open_volume``.
        form: see ``read_grid``.
        rescale: see ``read_grid``.

    Returns:
        The CT.

    Raises:
        RejectedError: as ``read_grid``, and if the file is damaged or a voxel is not finite.
    """
    with open_volume(path) as file:
        how = geometry(file.header, form, rescale)
        stored = np.empty(how.grid.shape, np.int16, order="F")
        seen = HUValues()
        for first, planes in file.planes():
            out = stored[..., first : first + planes.shape[-1]]
            _store_planes(planes, how, out, first, seen)
        sha256 = file.sha256()
    hu, spacing_mm = axial_slices(stored, how.grid.affine)
    return StoredCT(hu, seen, spacing_mm, how.grid, sha256)


def _store_planes(planes: np.ndarray, how: Geometry, out: np.ndarray, first: int, seen: HUValues) -> None:
    if not store_hu(planes, how.slope, how.intercept, out, seen):
        hu = planes * np.float64(how.slope) + how.intercept
        x, y, plane = np.argwhere(~np.isfinite(hu))[0]
        raise RejectedError(
            "non-finite voxels",
            f"voxels must be finite, got {hu[x, y, plane]} at ({x}, {y}, {first + plane}) as stored",
        )


def geometry(header: VolumeHeader, form: str, rescale: Rescale | None) -> Geometry:
    """Settle form, grid and rescale of a volume.

    v2: everything from the header. v1: rescale and spacing from the metadata, stored as LPS.

    Args:
        header: of its file.
        form: see ``read_grid``.
        rescale: see ``read_grid``.

    Returns:
        How to read it.

    Raises:
        RejectedError: as ``read_grid``.
    """
    if len(header.shape) != 3:
        raise RejectedError(
            "geometry",
            f"volume must have 3 axes, got shape {header.shape}. Save one volume per file.",
        )
    shape = header.shape[0], header.shape[1], header.shape[2]
    if form == "auto":
        form = "v1" if header.is_blank else "v2"
    if form == "v2":
        if header.is_blank:
            raise RejectedError(
                "v1 or v2",
                "a volume in HU must state its geometry, got a blank header: no orientation, or voxels of "
                "1 mm at the origin, as tools write that know none. If 1 mm is right, set the true origin.",
            )
        if header.contradiction:
            raise RejectedError(
                "geometry",
                f"header must state one geometry, got {header.contradiction}. Correct the one that is wrong.",
            )
        grid = StoredGrid(shape, header.affine, header.axcodes)
        how = Geometry("v2", grid, header.slope, header.intercept)
    else:
        raw = _raw_rescale(header, rescale)
        check_spacing(raw.spacing_mm)  # of the table: an affine would show no sign
        affine = np.diag([-raw.spacing_mm[0], -raw.spacing_mm[1], raw.spacing_mm[2], 1.0])
        grid = StoredGrid(shape, affine, "LPS", has_origin=False)
        how = Geometry("v1", grid, raw.slope, raw.intercept)
    canonical_shape(how.grid)
    if how.form == "v2" and rescale is not None:
        _check_metadata(how.grid, rescale)
    return how


def _check_metadata(grid: StoredGrid, rescale: Rescale) -> None:
    """Compare the header's spacing with the table's where it states one: either may be wrong."""
    _, _, spacing_mm = voxel_axes(grid.affine)
    pairs = zip(spacing_mm, rescale.spacing_mm, strict=True)
    if any(math.isfinite(said) and abs(mm - said) > SPACING_TOLERANCE * mm for mm, said in pairs):
        raise RejectedError(
            "spacing",
            f"header and metadata must state one spacing, got {shown_mm(spacing_mm)} mm in the header and "
            f"{shown_mm(rescale.spacing_mm)} mm in the metadata",
        )


def _raw_rescale(header: VolumeHeader, rescale: Rescale | None) -> Rescale:
    if not header.is_blank or (header.slope, header.intercept) != (1, 0):
        raise RejectedError(
            "v1 or v2",
            f"a raw volume must have a blank header, got {header.axcodes} and a rescale of its own",
        )
    if rescale is None:
        raise RejectedError(
            "v1 or v2", "a raw volume must have a row in the metadata, got a blank header alone"
        )
    slope, intercept, _ = rescale
    if not (math.isfinite(slope) and slope > 0 and math.isfinite(intercept)):
        raise RejectedError(
            "rescale", f"slope and intercept must be numbers, got {slope:g} and {intercept:g}"
        )
    return rescale
