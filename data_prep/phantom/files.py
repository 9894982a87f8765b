"""Writes one synthetic volume into CT-RATE's, ReXGroundingCT's and RAD-ChestCT's folders.

Every file is written under a temporary name and renamed, so an existing file is complete. A volume is
finished when its sidecar ``synthetic/<name>.json``, written last, exists.
"""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common.run.process import atomic_file
from data_prep.phantom.population import CT_RATE_LABELS, ScanId
from data_prep.phantom.scan import Volume
from data_prep.phantom.scanner import Protocol
from data_prep.phantom.scene import Finding

DESCRIPTION = "SYNTHETIC phantom, not a patient"
FORMS = ("v1", "v2", "both")
RAD_CHESTCT_RANGE_HU = (-1000, 1000)
GOLDEN_RATIO = (5**0.5 - 1) / 2
# One patient in this many of the training split is RAD-ChestCT's validation: there 803 of 3,089 volumes.
RAD_VALIDATION_EVERY = 4


def volume_path(out: Path, scan: ScanId, form: str) -> Path:
    """CT-RATE's path of a volume; form "v1", or "v2" (``_fixed``)."""
    folder = scan.split if form == "v1" else f"{scan.split}_fixed"
    return out / "dataset" / folder / scan.folder / f"{scan.name}.nii.gz"


def ts_path(out: Path, scan: ScanId) -> Path:
    """CT-RATE's path of a volume's TotalSegmentator map."""
    return (
        out / "dataset" / "ts_seg" / "ts_total" / f"{scan.split}_fixed" / scan.folder / f"{scan.name}.nii.gz"
    )


def rex_path(out: Path, scan: ScanId) -> Path:
    """ReXGroundingCT's path of a volume's masks."""
    return out / "rexgroundingct" / "segmentations" / f"{scan.name}.nii.gz"


def rad_name(scan: ScanId) -> str:
    """RAD-ChestCT's name of a volume: trn, val or tst and five digits."""
    is_validation = scan.patient % RAD_VALIDATION_EVERY == 0
    prefix = "tst" if scan.split == "valid" else "val" if is_validation else "trn"
    return f"{prefix}{scan.number + 1:05d}"


def rad_path(out: Path, scan: ScanId) -> Path:
    """RAD-ChestCT's path of a volume."""
    return out / "rad_chestct" / f"{rad_name(scan)}.npz"


def sidecar_path(out: Path, scan: ScanId) -> Path:
    """Path of the record of what was drawn into a volume."""
    return out / "synthetic" / f"{scan.name}.json"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file, and its folder, so that it is either complete or missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)


def _gzip(content: bytes, strategy: int) -> bytes:
    """Gzip without time stamp: the same input gives the same bytes."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31, 9, strategy)
    return packer.compress(content) + packer.flush()


def affine_of(protocol: Protocol, shape: tuple[int, ...], axcodes: str) -> NDArray[np.float64]:
    """Voxel-to-world affine (RAS+ mm) of a volume of shape (Z, Y, X) stored with axis codes such as "RAS"."""
    first = -(shape[2] - 1) / 2 * protocol.pixel_mm
    affine = np.diag([-protocol.pixel_mm, -protocol.pixel_mm, protocol.slice_mm, 1.0])
    affine[:3, 3] = (-first, -first, protocol.bottom_mm)
    for axis, (code, stored) in enumerate(zip("LPS", axcodes, strict=True)):
        if code != stored:
            affine[:3, 3] += affine[:3, axis] * (shape[2 - axis] - 1)
            affine[:3, axis] *= -1
    return affine


def stored_order(array: NDArray[Any], axcodes: str) -> NDArray[Any]:
    """(Z, Y, X, ...) in LPS to (X, Y, Z, ...) with the axis codes."""
    turned = np.swapaxes(array, 0, 2)
    flips = tuple(
        axis for axis, (code, stored) in enumerate(zip("LPS", axcodes, strict=True)) if code != stored
    )
    return np.flip(turned, flips)


def nifti_bytes(
    array: NDArray[Any], affine: NDArray[np.float64], header: bool = True, noisy: bool = False
) -> bytes:
    """Gzipped NIfTI of an array.

    Args:
        array: voxels in stored order.
        affine: written where ``header`` is true.
        header: false leaves the header blank: identity affine, no units, as in CT-RATE's first form.
        noisy: images; compressed by run lengths only, which is faster and hardly larger for noise.
    """
    image = nib.nifti1.Nifti1Image(array, affine if header else np.eye(4))
    if header:
        image.header.set_xyzt_units("mm")
        image.header.set_qform(affine, code=1)
        image.header.set_sform(affine, code=1)
    image.header["descrip"] = DESCRIPTION
    return _gzip(image.to_bytes(), zlib.Z_RLE if noisy else zlib.Z_DEFAULT_STRATEGY)


def rex_findings(volume: Volume, share: float) -> list[Finding]:
    """Findings that ReXGroundingCT would annotate; empty for scans outside the annotated share.

    Annotated patients are spread evenly over the roster (golden-ratio sequence), even in small cohorts.
    """
    scan = volume.scan
    *cohort, patient = scan.seed
    turn = (patient * GOLDEN_RATIO + float(np.random.default_rng(cohort).random())) % 1.0
    if scan.reconstruction != 1 or turn >= share:
        return []
    return [finding for finding in volume.findings if finding.code]


def _rex_bytes(volume: Volume, findings: list[Finding], axcodes: str) -> bytes:
    """4-D masks (F, H, W, D) on the CT's grid; the header holds the CT's affine for the last three axes."""
    masks = np.zeros((*volume.hu.shape, len(findings)), dtype=np.uint8)
    for index, finding in enumerate(findings):
        masks[(*finding.region.box, index)] = finding.region.mask
    stored = np.moveaxis(stored_order(masks, axcodes), 3, 0)
    return nifti_bytes(stored, affine_of(volume.protocol, volume.hu.shape, axcodes))


def resample_linear(
    volume: NDArray[np.int16], spacing_mm: tuple[float, float, float], target_mm: float
) -> NDArray[np.int16]:
    """Resample HU (Z, Y, X) from (z, y, x) spacing to cubes, linearly; the first voxel stays in place."""
    result = volume.astype(np.float32)
    for axis, spacing in enumerate(spacing_mm):
        if abs(spacing - target_mm) < 1e-6:
            continue
        last = volume.shape[axis] - 1
        at = np.arange(int(last * spacing / target_mm + 1e-6) + 1) * (target_mm / spacing)
        low = np.minimum(at.astype(np.intp), max(last - 1, 0))
        high = np.minimum(low + 1, last)
        share = (at - low).astype(np.float32).reshape([-1 if axis == other else 1 for other in range(3)])
        start = np.take(result, low, axis)
        result = start + share * (np.take(result, high, axis) - start)
    return np.rint(result).astype(np.int16)


def rad_chestct_array(volume: Volume, spacing_mm: float) -> NDArray[np.int16]:
    """A volume as RAD-ChestCT stores it: (I, P, L), cubes, HU clipped to +-1000."""
    protocol = volume.protocol
    clipped = np.clip(volume.hu, *RAD_CHESTCT_RANGE_HU)
    spacing = (protocol.slice_mm, protocol.pixel_mm, protocol.pixel_mm)
    return resample_linear(clipped[::-1], spacing, spacing_mm)


def npz_bytes(array: NDArray[np.int16]) -> bytes:
    """An npz with the array under ``ct``, the same bytes for the same input."""
    raw, packed = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(raw, np.ascontiguousarray(array), allow_pickle=False)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(zipfile.ZipInfo("ct.npy"), raw.getvalue(), zipfile.ZIP_DEFLATED, 1)
        archive.comment = DESCRIPTION.encode("ascii")
    return packed.getvalue()


def sidecar(volume: Volume, annotated: list[Finding]) -> dict[str, Any]:
    """What was drawn, as JSON."""
    protocol = volume.protocol
    return {
        "synthetic": True,
        "name": volume.scan.name,
        "number": volume.scan.number,
        "is_head": volume.scan.is_head,
        "kernel": protocol.kernel.name,
        "noise_hu": round(protocol.noise_hu, 2),
        "is_enhanced": protocol.is_enhanced,
        "shape": list(volume.hu.shape),
        "spacing_mm": [protocol.pixel_mm, protocol.pixel_mm, protocol.slice_mm],
        "severity": {
            label: round(volume.labels[label], 4) for label in CT_RATE_LABELS if label in volume.labels
        },
        "findings": [
            {
                "label": finding.label,
                "code": finding.code,
                "text": finding.text,
                "location": finding.location,
                "size_mm": round(finding.size_mm, 1),
                "num_voxels": finding.region.num_voxels(),
                "first_slice": int(finding.region.box[0].start),
                "area_px": finding.region.mask.sum((1, 2)).tolist(),
            }
            for finding in volume.findings
        ],
        "rexgroundingct": {
            "findings": {str(index): finding.text for index, finding in enumerate(annotated)},
            "categories": {str(index): finding.code for index, finding in enumerate(annotated)},
        },
    }


def write_volume(
    volume: Volume, out: Path, form: str, rex_share: float, npz_spacing_mm: float | None
) -> dict[str, Any]:
    """Write all files of a volume, its sidecar last.

    Args:
        volume: the rendered volume.
        out: the cohort's folder.
        form: "v1", "v2" or "both".
        rex_share: share of the scans with lung findings that ReXGroundingCT annotates.
        npz_spacing_mm: also write RAD-ChestCT's npz with this spacing; None: no.

    Returns:
        The sidecar.
    """
    scan, protocol, shape = volume.scan, volume.protocol, volume.hu.shape
    affine = affine_of(protocol, shape, protocol.axcodes)
    if form in ("v2", "both"):
        stored = stored_order(volume.hu, protocol.axcodes)
        write_atomic(volume_path(out, scan, "v2"), nifti_bytes(stored, affine, noisy=True))
    if form in ("v1", "both"):
        raw = stored_order((volume.hu.astype(np.int32) - protocol.intercept).astype(np.int16), "LPS")
        write_atomic(volume_path(out, scan, "v1"), nifti_bytes(raw, affine, header=False, noisy=True))
    write_atomic(ts_path(out, scan), nifti_bytes(stored_order(volume.ts, protocol.axcodes), affine))
    annotated = rex_findings(volume, rex_share)
    if annotated:
        write_atomic(rex_path(out, scan), _rex_bytes(volume, annotated, protocol.axcodes))
    if npz_spacing_mm is not None and not scan.is_head:
        write_atomic(rad_path(out, scan), npz_bytes(rad_chestct_array(volume, npz_spacing_mm)))
    record = sidecar(volume, annotated)
    write_atomic(sidecar_path(out, scan), json.dumps(record, indent=1).encode("ascii"))
    return record
