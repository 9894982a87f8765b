"""What lies under each patch of a cropped slice, counted from full-resolution masks by their runs."""

# S slices, H side of the padded slice, G patches along a side, P = G * G patches of a slice, row-major

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

SLICES_PER_CHUNK = 32
"""Slices counted at a time, so that temporaries stay small; our choice, results do not depend on it."""


def patch_shares(ids: np.ndarray, box: tuple[int, int, int], grid: int, num_classes: int) -> csr_matrix:
    """Return the share of every patch's area that each class covers, background included.

    The patches of an image that was cropped to the box and resized, area-true, to any multiple of ``grid``
    divide the box evenly. A mask's pixel that a border between patches cuts counts for each by the part that
    lies in it: areas are whole numbers in units of 1 / grid of a pixel, so that no share is rounded before
    it is stored.

    Runs of equal pixels along rows are counted rather than pixels: a row of a label map has a score of them.

    Source: DALE-CT IV-A3. That labels pass through the crop of the image is ours: in the released code they
    come from the whole slice, and lie beside the patches.

    Args:
        ids: class of each pixel, slices padded to squares.
        box: top, left and side in pixels, of ``common.transforms.slice_strategies.body_box``.
        grid: patches along a side, G.
        num_classes: ids are below it.

    Shape:
        ``ids (S, H, H)`` of whole numbers. Output: float32, sparse, ``(S * P, num_classes)``; rows add to 1.

    Raises:
        ValueError: if the shape or the box does not fit, or an id is not a class.
    """
    _check(ids, box, grid)
    if int(ids.max()) >= num_classes or int(ids.min()) < 0:
        raise ValueError(f"ids must be 0 to {num_classes - 1}, got {int(ids.min())} to {int(ids.max())}.")
    patches, shares = grid * grid, []
    for first in range(0, len(ids), SLICES_PER_CHUNK):
        chunk = ids[first : first + SLICES_PER_CHUNK]
        patch, value, area = _areas(chunk, box, grid)
        counts = np.bincount(
            patch * num_classes + value, weights=area, minlength=len(chunk) * patches * num_classes
        ).reshape(-1, num_classes)
        counts[:, 0] = box[2] ** 2 - counts.sum(1)
        shares.append(csr_matrix((counts / box[2] ** 2).astype(np.float32)))
    return _stacked(shares, num_classes)


def patch_bits(bits: np.ndarray, box: tuple[int, int, int], grid: int) -> NDArray[np.uint16]:
    """Return the findings that touch each patch: every bit that any of its pixels has, in part or whole.

    Source: DALE-CT IV-A3, any positive in the cell; through the crop of the image as ``patch_shares``.

    Args:
        bits: ``(S, H, H)`` uint16, bit k for the k-th of ``common/labels/rexgroundingct.csv``.
        box: see ``patch_shares``.
        grid: see ``patch_shares``.

    Returns:
        uint16 ``(S, P)``.

    Raises:
        ValueError: if the shape or the box does not fit.
    """
    _check(bits, box, grid)
    found = np.zeros((len(bits), grid * grid), np.uint16)
    shown = np.flatnonzero(bits.any(axis=(1, 2)))
    for first in range(0, len(shown), SLICES_PER_CHUNK):
        chunk = shown[first : first + SLICES_PER_CHUNK]
        patch, value, _ = _areas(bits[chunk], box, grid)
        of_chunk = np.zeros(len(chunk) * grid * grid, np.uint16)
        np.bitwise_or.at(of_chunk, patch, value.astype(np.uint16))
        found[chunk] = of_chunk.reshape(len(chunk), -1)
    return found


def slice_shares(shares: csr_matrix, patches: int) -> NDArray[np.float32]:
    """Return the share ``(S, C)`` of every slice that each class covers: the mean of its P patches."""
    num_slices = shares.shape[0] // patches
    rows = np.repeat(np.arange(num_slices), np.diff(shares.indptr[::patches]))
    flat = np.bincount(
        rows * shares.shape[1] + shares.indices, weights=shares.data, minlength=num_slices * shares.shape[1]
    )
    return (flat.reshape(num_slices, -1) / patches).astype(np.float32)


def _check(mask: np.ndarray, box: tuple[int, int, int], grid: int) -> None:
    top, left, side = box
    if mask.ndim != 3 or mask.shape[1] != mask.shape[2] or 0 in mask.shape:
        raise ValueError(f"mask must have shape (S, H, H), got {mask.shape}. Pad slices to squares.")
    if grid < 1:
        raise ValueError(f"grid must be positive, got {grid}.")
    if min(top, left) < 0 or side < 1 or max(top, left) + side > mask.shape[1]:
        raise ValueError(f"box must lie in slices of {mask.shape[1]} pixels, got {box}.")


def _areas(
    mask: np.ndarray, box: tuple[int, int, int], grid: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return runs of pixels that are not 0, cut at the patches' borders: patch, value and area.

    Lengths are in 1 / grid of a pixel: pixel x covers [x * grid, (x + 1) * grid) and patch g
    [g * side, (g + 1) * side).
    """
    top, left, side = box
    crop = np.ascontiguousarray(mask[:, top : top + side, left : left + side])
    starts_here = np.ones(crop.shape, bool)
    np.not_equal(crop[..., 1:], crop[..., :-1], out=starts_here[..., 1:])
    start = np.flatnonzero(starts_here)
    length = np.diff(start, append=crop.size)
    value = crop.ravel()[start]
    kept = value != 0
    start, length, value = start[kept], length[kept], value[kept].astype(np.int64)
    line, x = np.divmod(start, side)
    run, column, width = _cut(x * grid, (x + length) * grid, side)
    slice_of, y = np.divmod(line[run], side)
    part, row, height = _cut(y * grid, (y + 1) * grid, side)
    patch = (slice_of[part] * grid + row) * grid + column[part]
    return patch, value[run[part]], width[part] * height


def _cut(
    start: NDArray[np.int64], stop: NDArray[np.int64], side: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Cut stretches at the multiples of ``side``: which stretch each part is of, its patch, its length."""
    first = start // side
    number = (stop - 1) // side - first + 1
    of = np.repeat(np.arange(len(start)), number)
    patch = first[of] + np.arange(len(of)) - np.repeat(number.cumsum() - number, number)
    return of, patch, np.minimum(stop[of], (patch + 1) * side) - np.maximum(start[of], patch * side)


def _stacked(parts: list[csr_matrix], num_classes: int) -> csr_matrix:
    """Stack matrices of rows; scipy's own takes the wider index type for nothing."""
    ends = np.cumsum([0, *(part.nnz for part in parts)])
    indptr = np.concatenate([[0], *(part.indptr[1:] + end for part, end in zip(parts, ends, strict=False))])
    data = np.concatenate([part.data for part in parts])
    indices = np.concatenate([part.indices for part in parts])
    return csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, num_classes))
