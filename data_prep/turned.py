"""Volumes turned on purpose, to measure what it costs an encoder to see slices unlike those of its training.

Shapes: Z H W canonical axes (slices from the feet, rows to the back, columns to the left).
"""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from common.ct.files import VOLUME_SUFFIXES, ct_file, only_file, read_ct, suffix_of, volume_files
from common.ct.nifti import Rescale
from common.ct.npz import SPACING_MM
from common.run.process import atomic_file

TURNS = ("right", "transposed", "flipped", "sagittal")

Spacing = tuple[float, float, float]


def turned_slices(hu: np.ndarray, spacing_mm: Spacing, turn: str) -> tuple[np.ndarray, Spacing]:
    """Turn canonical slices.

    Args:
        hu: canonical slices.
        spacing_mm: spacing as (x, y, z).
        turn: "right": as they are. "transposed": rows for columns, as DALE-CT's authors showed CT-RATE to
            their encoders. "flipped": mirrored, the patient's left for the right. "sagittal": RAD-ChestCT's
            arrays, stored (inferior, posterior, left), taken for (x, y, z), as the authors' reader did:
            slices from right to left, whose columns run from head to feet.

    Shape:
        Input ``(Z, H, W)``. Output a view: the same, ``(Z, W, H)`` transposed, ``(W, H, Z)`` sagittal.

    Returns:
        The slices and their spacing.

    Raises:
        ValueError: if there is no such turn.

    Example:
        >>> turned_slices(np.zeros((2, 3, 5)), (0.7, 0.8, 2.0), "sagittal")[0].shape
        (5, 3, 2)
    """
    x, y, z = spacing_mm
    match turn:
        case "right":
            return hu, spacing_mm
        case "transposed":
            return hu.transpose(0, 2, 1), (y, x, z)
        case "flipped":
            return hu[:, :, ::-1], spacing_mm
        case "sagittal":
            return hu[::-1].transpose(2, 1, 0), (z, y, x)
    raise ValueError(f"turn must be one of {TURNS}, got '{turn}'.")


def find_volumes(root: Path, prefix: str) -> dict[str, Path]:
    """List the volumes under a folder whose names start with a prefix.

    Returns:
        Volume to file, in the order of their names.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a volume is there twice.
    """
    found = {
        volume: only_file(paths, "volumes")
        for volume, paths in volume_files(root, VOLUME_SUFFIXES).items()
        if volume.startswith(prefix)
    }
    if not found:
        raise FileNotFoundError(f"No volumes {prefix}* in '{root}'.")
    return found


def write_turned(path: Path, turn: str, out: Path, spacing_mm: float = SPACING_MM) -> None:
    """Write a volume as NIfTI whose header claims the standard orientation.

    Args:
        path: volume in HU.
        turn: one of ``TURNS``.
        out: ``.nii.gz`` to write; it appears only when complete.
        spacing_mm: edge of an npz file's voxels.

    Raises:
        RejectedError: if the file is no CT.
        ValueError: if there is no such turn.
    """
    is_npz = suffix_of(path.name) == ".npz"
    ct = read_ct(ct_file(path), rescale=Rescale(1, 0, 3 * (spacing_mm,)) if is_npz else None)
    hu, (x, y, z) = turned_slices(ct.hu, ct.spacing_mm, turn)
    image = nib.Nifti1Image(np.ascontiguousarray(hu.transpose(2, 1, 0)), np.diag([-x, -y, z, 1.0]))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as file:
        file.write(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
