"""Reads a CT of RAD-ChestCT, an npz array without a header."""

import io
import math
import tokenize
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from common.ct.geometry import (
    CT,
    Grid,
    HUValues,
    axial_slices,
    canonical_shape,
    check_size,
    rejecting,
    store_hu,
)
from common.ct.nifti import MAX_INFLATION
from common.ct.rejection import RejectedError
from common.ct.unzip import DAMAGED_ZIP
from common.run.process import sha256_of

SPACING_MM = 0.8
"""All volumes were resampled to cubes of this size. Source: the dataset's description."""

MAX_HEADER_BYTES = 2**14
"""Length of an array's header; NumPy refuses text of more than 10,000 characters."""

DAMAGED = (
    *(OSError, KeyError, ValueError, *DAMAGED_ZIP),
    *(SyntaxError, tokenize.TokenError, TypeError, MemoryError),  # of the header, which NumPy evaluates
)
"""What reading a damaged file raises."""


def npz_affine(spacing_mm: float = SPACING_MM) -> np.ndarray:
    """Return the affine of a volume: stored head to feet, anterior to posterior, right to left (IPL)."""
    affine = np.eye(4)
    affine[:3, :3] = -spacing_mm * np.eye(3)[::-1]
    return affine


def read_grid(path: Path, spacing_mm: float = SPACING_MM) -> Grid:
    """Read on which grid a volume is stored, without its voxels.

    The file does not say where in the world it lies: the first voxel is put at the origin.

    Args:
        path: ``trn*.npz``, ``val*.npz`` or ``tst*.npz``, HU under the key ``ct``.
        spacing_mm: edge of a voxel.

    Raises:
        RejectedError: if the file is damaged or its array no CT.
    """
    with _open_array(path) as (member, num_bytes):
        shape, dtype, offset = _array_header(member)
        expected = offset + math.prod(shape) * dtype.itemsize
    if dtype.kind not in "iuf":
        raise RejectedError("unreadable", f"voxels of '{path.name}' must be numbers, got {dtype}")
    if num_bytes != expected:
        detail = f"'{path.name}' must hold {expected} bytes of 'ct', got {num_bytes}: it is not whole"
        raise RejectedError("unreadable", detail)
    if len(shape) != 3 or min(shape) < 1:
        raise RejectedError("geometry", f"volume must have 3 axes, got shape {shape}")
    check_size(shape)
    return Grid((shape[0], shape[1], shape[2]), npz_affine(spacing_mm), has_origin=False)


def read_ct(path: Path, spacing_mm: float = SPACING_MM) -> CT:
    """Read a volume; arguments as for ``read_grid``.

    Raises:
        RejectedError: as ``read_grid``, and if the grid is not that of a CT, the file ends early, its
            checksum is wrong or a voxel is not finite.
    """
    grid = read_grid(path, spacing_mm)
    canonical_shape(grid)
    with _open_array(path) as (member, _):
        stored = np.lib.format.read_array(member, allow_pickle=False)
        member.read()  # to the end, where zipfile compares the checksum
    slices, voxel_mm = axial_slices(stored, grid.affine)
    hu, kept = np.empty(slices.shape, np.int16), HUValues()
    for z, plane in enumerate(slices):
        store_hu(plane, 1, 0, out=hu[z], kept=kept, where=f"slice {z}")
    return CT(hu, voxel_mm, grid, sha256_of(path), kept)


@contextmanager
def _open_array(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open the array of a volume for reading; yields it and the bytes that it should have."""
    with rejecting(f"'{path.name}' as npz with an array 'ct'", DAMAGED):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive, archive.open("ct.npy") as member:
            num_bytes = archive.getinfo("ct.npy").file_size
            if num_bytes > size * MAX_INFLATION:
                raise EOFError(f"{size} bytes for an array of {num_bytes}")
            yield member, num_bytes


def _array_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, int]:
    """Read shape, type and length of the header of a npy file.

    From a copy of its first bytes: NumPy would believe a header that says it is gigabytes long.
    """
    head = io.BytesIO(member.read(MAX_HEADER_BYTES))
    version = np.lib.format.read_magic(head)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    return shape, dtype, head.tell()
