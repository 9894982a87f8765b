"""One CT volume and its masks on disk, and how they become what a shard holds."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.shard_volume import VOLUME_NAME, VolumeSlices
from data_prep.nifti_file import NiftiHeader, canonical_hu, canonical_shape, read_header, read_stored
from data_prep.rejection import RejectedError
from data_prep.rexgroundingct import Annotation, read_findings
from data_prep.totalsegmentator import read_label_map

FORMS = ("auto", "v1", "v2")

AIR_HU = -800
"""Every CT in HU holds air at or below this; CT-RATE's raw values start near 0 and stay above it."""

SPACING_RANGE_MM = (0.1, 20.0)
"""Spacings a chest CT can have. Our choice: CT-RATE's metadata has 0.035 mm, no scanner has."""


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


class SourceVolume(NamedTuple):
    """A volume to be written into shards.

    Args:
        volume: name.
        split: such as ``train``.
        ct: NIfTI file.
        form: ``v2`` is in HU with a header that says so; ``v1`` is raw with a blank header, and ``rescale``
            says the rest; ``auto`` is v1 iff the header is blank.
        rescale: needed for v1.
        ts: TotalSegmentator label map, or None.
        rex: ReXGroundingCT annotation, or None.
        labels: class name to 0 or 1, or None.
    """

    volume: str
    split: str
    ct: Path
    form: str
    rescale: Rescale | None = None
    ts: Path | None = None
    rex: Annotation | None = None
    labels: dict[str, int] | None = None


class Geometry(NamedTuple):
    """How a stored array becomes HU in the world.

    Args:
        form: ``v1`` or ``v2``.
        affine: ``(4, 4)`` voxel to RAS+ world in mm.
        slope: HU = slope * stored + intercept.
        intercept: see ``slope``.
        axcodes: where the stored axes point.
    """

    form: str
    affine: np.ndarray
    slope: float
    intercept: float
    axcodes: str


def planned_slices(source: SourceVolume) -> int:
    """Return the number of slices a volume will have, from headers and metadata alone.

    Args:
        source: the volume.

    Returns:
        Number of slices.

    Raises:
        RejectedError: for everything that can be known without the voxels.
    """
    if not VOLUME_NAME.fullmatch(source.volume):
        raise RejectedError("name", f"volume must match {VOLUME_NAME.pattern}, got '{source.volume}'")
    header = read_header(source.ct)
    return canonical_shape(header, geometry(source, header).affine)[0]


def read_volume(source: SourceVolume) -> VolumeSlices:
    """Read a volume and its masks.

    Args:
        source: the volume.

    Returns:
        What a shard holds of it.

    Raises:
        RejectedError: if anything about the CT or a mask is not what it must be.
    """
    stored, header = read_stored(source.ct)
    how = geometry(source, header)
    if how.form == "v1" and stored.min() <= AIR_HU:
        raise RejectedError(
            "v1 or v2", f"raw values must be above {AIR_HU}, got {stored.min():g}: this is in HU already"
        )
    hu, spacing_mm, lowest = canonical_hu(stored, how.affine, how.slope, how.intercept)
    if lowest > AIR_HU:
        raise RejectedError(
            "not in HU",
            f"a CT in HU must hold air, {AIR_HU} or less, got values from {lowest:g} HU as {how.form}",
        )
    return VolumeSlices(
        volume=source.volume,
        ct=hu,
        ts=None if source.ts is None else read_label_map(source.ts, hu.shape, spacing_mm),
        rex=None if source.rex is None else read_findings(source.rex, header, how.affine, spacing_mm),
        spacing_mm=spacing_mm,
        original_shape=(header.shape[0], header.shape[1], header.shape[2]),
        original_axcodes=how.axcodes,
        labels=source.labels,
        split=source.split,
    )


def geometry(source: SourceVolume, header: NiftiHeader) -> Geometry:
    """Settle form, affine and rescale of a volume, so that nothing is rescaled twice or not at all.

    v2: everything from the header. v1: rescale and spacing from the metadata, stored as LPS.

    Args:
        source: the volume.
        header: of its file.

    Returns:
        How to read it.

    Raises:
        RejectedError: if header, form and metadata contradict one another, or the spacing is not a CT's.
    """
    form = source.form
    if form == "auto":
        form = "v1" if header.is_blank else "v2"
    if form == "v2":
        if header.is_blank:
            raise RejectedError("v1 or v2", "a volume in HU must state its geometry, got a blank header")
        how = Geometry("v2", header.affine, header.slope, header.intercept, header.axcodes)
        spacing_mm = tuple(np.linalg.norm(header.affine[:3, :3], axis=0).tolist())
    else:
        rescale = _raw_rescale(source, header)
        spacing_mm = rescale.spacing_mm
        affine = np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1.0])
        how = Geometry("v1", affine, rescale.slope, rescale.intercept, "LPS")
    low, high = SPACING_RANGE_MM
    if not all(math.isfinite(mm) and low <= mm <= high for mm in spacing_mm):
        shown = ", ".join(f"{mm:g}" for mm in spacing_mm)
        raise RejectedError("spacing", f"spacing must lie in {low}..{high} mm, got ({shown})")
    return how


def _raw_rescale(source: SourceVolume, header: NiftiHeader) -> Rescale:
    if not header.is_blank or (header.slope, header.intercept) != (1, 0):
        raise RejectedError(
            "v1 or v2",
            f"a raw volume must have a blank header, got {header.axcodes} and a rescale of its own",
        )
    if source.rescale is None:
        raise RejectedError(
            "v1 or v2", "a raw volume must have a row in the metadata, got a blank header alone"
        )
    slope, intercept, _ = source.rescale
    if not (math.isfinite(slope) and slope > 0 and math.isfinite(intercept)):
        raise RejectedError(
            "rescale", f"slope and intercept must be numbers, got {slope:g} and {intercept:g}"
        )
    return source.rescale
