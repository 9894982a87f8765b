"""ReXGroundingCT: radiologists' masks of findings, as bit planes on the shards' 128 x 128 grid.

Shapes: F findings of a scan, X Y Z voxel axes of a mask as stored, Z H W slices, rows, columns of its CT.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.ct.files import only_file, open_volume, volume_files, volume_name
from common.ct.geometry import SPACING_TOLERANCE, Grid
from common.ct.nifti import VolumeFile, VolumeHeader
from common.ct.rejection import RejectedError
from common.shards.codec import MASK_SIZE_PX, REX_CODES
from data_prep.sources.mask_alignment import Alignment, align

logger = logging.getLogger(__name__)


class Annotation(NamedTuple):
    """The masks of one scan: their file, and the category of each channel (empty where it has none)."""

    path: Path
    codes: tuple[str, ...]


def read_annotations(dataset_json: Path, masks_dir: Path) -> dict[str, Annotation]:
    """List the annotated scans whose masks are available.

    Masks of the hidden test set are not published: scans without a mask file are left out.

    Args:
        dataset_json: ``{split: [{"name", "findings": {"0": text}, "categories": {"0": code}}]}``.
        masks_dir: folder of mask files named like the volumes.

    Returns:
        Volume to its annotation.

    Raises:
        FileNotFoundError: if the JSON or the folder is missing, or no scan has its masks there.
        ValueError: if the JSON has another form, a scan is listed twice, or a category is unknown.
    """
    if not dataset_json.is_file():
        raise FileNotFoundError(f"No file '{dataset_json}'.")
    if not masks_dir.is_dir():
        raise FileNotFoundError(f"No folder '{masks_dir}'.")
    annotations: dict[str, Annotation] = {}
    listed: set[str] = set()
    masks = volume_files(masks_dir)
    for name, codes in _items(dataset_json):
        volume = volume_name(name)
        if volume in listed:
            raise ValueError(f"Scan '{volume}' is listed twice in '{dataset_json}'.")
        listed.add(volume)
        if volume in masks:
            annotations[volume] = Annotation(only_file(masks[volume], "masks"), codes)
    if not annotations:
        raise FileNotFoundError(f"No mask of a scan in '{dataset_json}' is in '{masks_dir}'.")
    if len(annotations) < len(listed):
        logger.warning(
            "%d of %d scans listed in '%s' have no mask in '%s' and count as not annotated, such as '%s'.",
            *(len(listed) - len(annotations), len(listed), dataset_json, masks_dir),
            min(listed - annotations.keys()),
        )
    return annotations


def _items(dataset_json: Path) -> list[tuple[str, tuple[str, ...]]]:
    try:
        listed = [item for split in json.loads(dataset_json.read_text("utf-8")).values() for item in split]
        items = [(Path(item["name"]).name, _codes(item["categories"])) for item in listed]
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{dataset_json}' must be {{split: [{{name, findings, categories}}]}}, "
            f"got {type(error).__name__}: {error}."
        ) from error
    unknown = {code for _, codes in items for code in codes} - {*REX_CODES, ""}
    if unknown:
        raise ValueError(
            f"categories must be among {REX_CODES} or empty, got {sorted(unknown)} in '{dataset_json}'."
        )
    return items


def _codes(categories: dict[str, str]) -> tuple[str, ...]:
    return tuple((categories[str(channel)] or "").strip() for channel in range(len(categories)))


def read_findings(annotation: Annotation, ct: Grid) -> np.ndarray:
    """Read the masks of a scan: findings of one code are united, and the coarser grid loses no finding.

    Masks are stored as (F, X, Y, Z), or (X, Y, Z) for one finding. A header with the CT's spacing holds for
    their last three axes. If masks have the CT's shape, any other header says nothing (the format has no
    place for findings first), nor does one with an origin of zero where the CT has another: such masks lie on
    the CT's voxels as stored, as the dataset's users read them. Masks on another grid over the CT's space set
    the cells that hold the centre of one of their voxels, and those whose centre lies in such a voxel.

    Args:
        annotation: mask file and the code of each channel; channels without a code are left out.
        ct: grid of the CT.

    Returns:
        uint16 ``(Z, 128, 128)``, bit k set where any finding of ``REX_CODES[k]`` touches the cell.

    Raises:
        RejectedError: if the file is damaged, or its channels, shape or space do not fit.
    """
    with open_volume(annotation.path) as file:
        alignment = _alignment(file, annotation, ct)
        reduce = _pool if alignment.is_same_grid else _resample
        return reduce(_bit_planes(file, annotation), alignment)


def read_full_findings(annotation: Annotation, ct: Grid) -> np.ndarray:
    """Read the masks of a scan on the voxels of its CT, all of them.

    Args:
        annotation: as in ``read_findings``.
        ct: grid of the CT.

    Returns:
        uint16 ``(Z, H, W)``, bit k set where any finding of ``REX_CODES[k]`` is.

    Raises:
        RejectedError: as ``read_findings``, and if the masks are on another grid than the CT.
    """
    with open_volume(annotation.path) as file:
        alignment = _alignment(file, annotation, ct)
        whole = np.zeros(alignment.mask_shape, np.uint16, order="F")
        for k, bits in _bit_planes(file, annotation):
            whole[..., k] = bits
    return alignment.on_ct_grid(annotation.path.name, whole)


def _alignment(file: VolumeFile, annotation: Annotation, ct: Grid) -> Alignment:
    name, shape = annotation.path.name, file.header.shape
    channels = (1, *shape) if len(shape) == 3 else shape
    if len(channels) != 4 or channels[0] != len(annotation.codes):
        raise RejectedError(
            "mask",
            f"'{name}' must have one channel per finding, {len(annotation.codes)}, got shape {shape}",
        )
    return align(name, channels[1:], _mask_affine(file.header, channels[1:], ct), ct)


def _mask_affine(header: VolumeHeader, shape: tuple[int, ...], ct: Grid) -> np.ndarray:
    of_mask, of_ct = (
        np.sort(np.linalg.norm(affine[:3, :3], axis=0)) for affine in (header.affine, ct.affine)
    )
    is_placed = header.affine[:3, 3].any() or not ct.affine[:3, 3].any()
    speaks = (np.allclose(of_mask, of_ct, rtol=SPACING_TOLERANCE) and is_placed) or shape != ct.shape
    return header.affine if speaks and not header.is_blank else ct.affine


def _bit_planes(file: VolumeFile, annotation: Annotation) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the planes of the last axis with a finding: index and uint16 ``(X, Y)``, one bit per code."""
    codes = annotation.codes
    for first, planes in file.labels():
        findings = planes.reshape((len(codes), *planes.shape[-3:]), order="F")
        for n in np.flatnonzero(findings.any(axis=(0, 1, 2))):
            bits = np.zeros(findings.shape[1:3], np.uint16)
            for mask, code in zip(findings[..., n], codes, strict=True):
                if code:
                    bits |= (mask > 0) * np.uint16(1 << REX_CODES.index(code))
            yield first + int(n), bits


def _pool(planes: Iterator[tuple[int, np.ndarray]], alignment: Alignment) -> np.ndarray:
    """Unite the pixels of each cell, for masks on the CT's grid."""
    axes = alignment.axis_of
    is_slice_axis = [axis == axes[0] for axis in range(3)]
    sizes = [alignment.mask_shape[axis] if is_slice_axis[axis] else MASK_SIZE_PX for axis in range(3)]
    pooled = np.zeros(sizes, np.uint16)
    cells = [] if is_slice_axis[2] else cell_edges(alignment.mask_shape[2])
    for k, bits in planes:
        for axis in (0, 1):
            bits = bits if is_slice_axis[axis] else pool_bits(bits, axis)
        touched = [i for i, (start, stop) in enumerate(cells) if start <= k < stop] or [k]
        pooled[..., touched] |= bits[..., None]
    flips = tuple(slice(None, None, int(alignment.to_mask[axis, :3].sum())) for axis in range(3))
    return np.ascontiguousarray(pooled[flips].transpose(axes))


def _resample(planes: Iterator[tuple[int, np.ndarray]], alignment: Alignment) -> np.ndarray:
    """Unite in each cell the voxels whose centre lies in it and the voxel in which its centre lies."""
    whole = np.zeros(alignment.mask_shape, np.uint16, order="F")
    num_slices, *sizes = alignment.ct_shape
    cells = np.zeros((num_slices, MASK_SIZE_PX, MASK_SIZE_PX), np.uint16)
    to_ct = np.linalg.inv(alignment.to_mask)
    for k, bits in planes:
        whole[..., k] = bits
        i, j = np.nonzero(bits)
        place = to_ct[:3, :3] @ [i, j, np.full(len(i), k)] + to_ct[:3, 3:] + 0.5
        place[1:] *= MASK_SIZE_PX / np.array(sizes)[:, None]
        inside = ((place >= 0) & (place < np.array(cells.shape)[:, None])).all(axis=0)
        z, row, column = place[:, inside].astype(np.intp)
        np.bitwise_or.at(cells, (z, row, column), bits[i, j][inside])
    for z in range(num_slices):
        cells[z] |= whole[alignment.nearest(z)]
    return cells


def pool_bits(bits: np.ndarray, axis: int) -> np.ndarray:
    """Reduce an axis of integers to 128 cells; a cell has every bit that any of its pixels has.

    Example:
        >>> bits = np.zeros((512, 512), np.uint16)
        >>> bits[7, 511] = 4
        >>> cells = pool_bits(pool_bits(bits, 0), 1)
        >>> int(cells[1, 127]), int(np.count_nonzero(cells))
        (4, 1)
    """
    edges = cell_edges(bits.shape[axis])
    cells = [np.bitwise_or.reduce(bits.take(range(start, stop), axis), axis=axis) for start, stop in edges]
    return np.stack(cells, axis)


def cell_edges(size: int) -> list[tuple[int, int]]:
    """Return the pixels, first and one past the last, that each of 128 cells along an axis covers.

    Cell i of n pixels covers pixels floor(i n / 128) to ceil((i + 1) n / 128): each pixel is in at least one.
    """
    return [(i * size // MASK_SIZE_PX, -(-(i + 1) * size // MASK_SIZE_PX)) for i in range(MASK_SIZE_PX)]
