"""ReXGroundingCT: radiologists' masks of findings, as bit planes on the shards' 128 x 128 grid.

Shapes: F findings of a scan, Z slices, H rows, W columns of its CT.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.shard_volume import MASK_SIZE_PX, REX_CODES
from data_prep.nifti_file import NiftiHeader, canonical_shape, canonical_slices, read_stored, volume_of
from data_prep.rejection import RejectedError
from data_prep.totalsegmentator import SPACING_TOLERANCE


class Annotation(NamedTuple):
    """The masks of one annotated scan.

    Args:
        path: mask file.
        codes: category of each of its channels; empty where the dataset gives none.
    """

    path: Path
    codes: tuple[str, ...]


def read_annotations(dataset_json: Path, masks_dir: Path) -> dict[str, Annotation]:
    """List the annotated scans whose masks are at hand.

    Masks of the hidden test set are not published: scans without a mask file are left out.

    Args:
        dataset_json: ``{split: [{"name", "findings": {"0": text}, "categories": {"0": code}}]}``.
        masks_dir: folder of mask files named like the volumes.

    Returns:
        Volume to its annotation.

    Raises:
        FileNotFoundError: if the JSON or the folder is missing, or no scan has its masks there.
        ValueError: if the JSON has another form, a scan comes twice, or a category is unknown.
    """
    if not dataset_json.is_file():
        raise FileNotFoundError(
            f"rexgroundingct must be a JSON file, got '{dataset_json}', which does not exist."
        )
    if not masks_dir.is_dir():
        raise FileNotFoundError(f"rexgroundingct_masks must be a folder, got '{masks_dir}', which is none.")
    annotations: dict[str, Annotation] = {}
    listed: set[str] = set()
    for name, codes in _items(dataset_json):
        volume = volume_of(Path(name))
        if volume in listed:
            raise ValueError(f"a scan must come once in '{dataset_json}', got '{volume}' twice.")
        listed.add(volume)
        path = masks_dir / name
        if path.is_file():
            annotations[volume] = Annotation(path, codes)
    if not annotations:
        raise FileNotFoundError(
            f"rexgroundingct_masks must hold masks of scans in '{dataset_json}', got none in '{masks_dir}'."
        )
    return annotations


def _items(dataset_json: Path) -> list[tuple[str, tuple[str, ...]]]:
    try:
        listed = [item for split in json.loads(dataset_json.read_text("utf-8")).values() for item in split]
        items = [(Path(item["name"]).name, _codes(item["categories"])) for item in listed]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
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
    return tuple(categories[str(channel)].strip() for channel in range(len(categories)))


def read_findings(
    annotation: Annotation, ct: NiftiHeader, ct_affine: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """Read the masks of a scan: findings of one code are united, and no finding is lost to the smaller grid.

    Masks are stored as (F, X, Y, Z), or (X, Y, Z) for one finding, beside the CT's voxels. A header with the
    CT's spacing speaks for its last three axes; any other says nothing of them (the format has no place for
    findings first), and the masks then lie on the CT's voxels as stored, as the dataset's users take them.

    Args:
        annotation: mask file and the code of each channel; channels without a code are left out.
        ct: header of the CT.
        ct_affine: ``(4, 4)`` of the CT; not always its header's.
        spacing_mm: of the CT as (x, y, z).

    Returns:
        uint16 ``(Z, 128, 128)``, bit k set where any finding of ``REX_CODES[k]`` touches the cell.

    Raises:
        RejectedError: if the file is damaged, or its channels or shape do not fit.
    """
    stored, header = read_stored(annotation.path)
    name = annotation.path.name
    findings = stored[None] if stored.ndim == 3 else stored
    if findings.ndim != 4 or len(findings) != len(annotation.codes):
        raise RejectedError(
            "mask",
            f"'{name}' must have one channel a finding, got {len(annotation.codes)} and shape {stored.shape}",
        )
    affine = _mask_affine(header, ct_affine, spacing_mm)
    shape = canonical_shape(ct, ct_affine)
    planes = np.zeros(shape, np.uint16)
    for finding, code in zip(findings, annotation.codes, strict=True):
        mask, _ = canonical_slices(finding, affine)
        if mask.shape != shape:
            raise RejectedError("mask", f"'{name}' must have the CT's shape {shape}, got {mask.shape}")
        if code:
            bit = np.uint16(1 << REX_CODES.index(code))
            np.bitwise_or(planes, bit, out=planes, where=mask > 0)
    return pool_bits(planes)


def _mask_affine(header: NiftiHeader, ct_affine: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    own = np.sort(np.linalg.norm(header.affine[:3, :3], axis=0))
    speaks = not header.is_blank and np.allclose(own, np.sort(spacing_mm), rtol=SPACING_TOLERANCE)
    return header.affine if speaks else ct_affine


def pool_bits(planes: np.ndarray) -> np.ndarray:
    """Reduce each slice to 128 x 128 cells; a cell has every bit that any of its pixels has.

    Cell i of n pixels covers pixels floor(i n / 128) to ceil((i + 1) n / 128): each pixel is in at least one.

    Shape:
        Input ``(Z, H, W)`` of an integer type. Output ``(Z, 128, 128)`` of the same type.

    Example:
        >>> planes = np.zeros((1, 512, 512), np.uint16)
        >>> planes[0, 7, 511] = 4
        >>> int(pool_bits(planes)[0, 1, 127]), int(np.count_nonzero(pool_bits(planes)))
        (4, 1)
    """
    for axis in (1, 2):
        size = planes.shape[axis]
        edges = [(i * size // MASK_SIZE_PX, -(-(i + 1) * size // MASK_SIZE_PX)) for i in range(MASK_SIZE_PX)]
        cells = [
            np.bitwise_or.reduce(planes.take(range(start, stop), axis), axis=axis) for start, stop in edges
        ]
        planes = np.stack(cells, axis)
    return planes
