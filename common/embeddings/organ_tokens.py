"""Patch tokens of a volume, averaged within organs: a bag of some twenty tokens in place of hundreds."""

# Z = S slices of H x W voxels or P patches, D embedding, C = 118 classes of TotalSegmentator, O organs

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from common.cohort.cohort import load_labels
from common.embeddings.dense_cohort import patch_order

OTHER = "other"
WITH_RADIOMICS = "_organs_radiomics"
"""End of a store's preprocessing whose tokens are followed by :func:`organ_radiomics`."""
ORGANS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("lung_upper_lobe_left", "lung_lower_lobe_left")},
    **{name: (name,) for name in ("lung_upper_lobe_right", "lung_middle_lobe_right")},
    **{name: (name,) for name in ("lung_lower_lobe_right", "trachea", "esophagus", "thyroid_gland")},
    "heart": ("heart", "atrial_appendage_left"),
    "aorta": ("aorta",),
    "great_vessels": (
        *("pulmonary_vein", "brachiocephalic", "subclavian", "common_carotid"),
        *("superior_vena_cava", "inferior_vena_cava"),
    ),
    **{name: (name,) for name in ("liver", "gallbladder", "spleen", "pancreas")},
    "stomach_and_bowel": ("stomach", "duodenum", "small_bowel", "colon"),
    "kidneys": ("kidney_",),
    "adrenal_glands": ("adrenal_gland",),
    "spine": ("vertebrae", "spinal_cord", "sacrum"),
    "thoracic_cage": ("rib_", "sternum", "costal_cartilages"),
    "shoulders": ("humerus", "scapula", "clavicula"),
    "back_muscles": ("autochthon",),
    OTHER: (),
}
"""Organs to beginnings of class names. "other" is what none of them covers, background included: an effusion
lies there. Our choice, for the chest."""


def organ_tokens(
    patches: torch.Tensor,
    shares: csr_matrix,
    slice_axes: str = "yx",
    organs: Mapping[str, Sequence[str]] = ORGANS,
) -> tuple[list[str], torch.Tensor]:
    """Average patch tokens within each organ, weighted by the share of the patch that it covers.

    Source: organ-wise pooling as in ORACLE-CT, arXiv:2601.13385; the weights, and "other", are ours.

    Args:
        patches: ``(S, P, D)``, square grids.
        shares: ``(S * P, C)`` of :func:`common.transforms.dense_labels.patch_shares`.
        slice_axes: how the encoder saw slices, "yx" or "xy", and so the order of the patches.
        organs: organ to beginnings of class names of ``common/labels/totalsegmentator.csv``.

    Returns:
        The organs that cover anything, and their tokens, float32 ``(O, D)``, in this order.

    Raises:
        ValueError: if shares and patches do not belong together, or a class belongs to two organs.
    """
    num_slices, num_patches, dim = patches.shape
    if shares.shape[0] != num_slices * num_patches:
        raise ValueError(
            f"shares must have a row for each of {num_slices} x {num_patches} patches, got {shares.shape[0]}."
        )
    member = _members(organs)
    weights = (shares @ member.astype(np.float32))[patch_order((num_slices, num_patches), slice_axes)]
    total = weights.sum(0, dtype=np.float64)
    sums = weights.T @ patches.reshape(-1, dim).float().numpy()
    found = total > 0
    names = [name for name, is_there in zip(organs, found, strict=True) if is_there]
    return names, torch.from_numpy((sums[found] / total[found, None]).astype(np.float32))


def organ_radiomics(hu: np.ndarray, ids: np.ndarray, spacing_mm: Sequence[float]) -> torch.Tensor:
    """Measure each organ: logarithm of its ml, mean of its HU / 100, and their standard deviation / 100.

    Source: volume, attenuation and texture as in JANUS, arXiv:2605.13813; the units, which bring the numbers
    near those of tokens, and the standard deviation as texture are our choice.

    Args:
        hu: ``(Z, H, W)``.
        ids: class of each voxel, ``(Z, H, W)``.
        spacing_mm: (x, y, z).

    Returns:
        float32 ``(O, 3)``, for those of ``ORGANS`` that have a voxel, in this order.
    """
    member = _members(ORGANS).astype(np.float64)
    flat, values = ids.ravel(), hu.ravel().astype(np.float64) / 100
    sums = [np.bincount(flat, power, len(member)) @ member for power in (None, values, values**2)]
    count, total, square = (each[sums[0] > 0] for each in sums)
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean**2, 0))
    volume = np.log(count * np.prod(spacing_mm) / 1000)
    return torch.from_numpy(np.stack([volume, mean, deviation], 1).astype(np.float32))


def dim_with_radiomics(identity: Mapping[str, Any]) -> int:
    """Return the width of organ tokens with their radiomics.

    Raises:
        ValueError: if the store's tokens have none.
    """
    if not str(identity["preprocessing"]).endswith(WITH_RADIOMICS):
        raise ValueError(
            f"embeddings must be of organs with radiomics, got preprocessing '{identity['preprocessing']}'. "
            "Write them by `dale-ct embed --organs MAPS --radiomics`."
        )
    return int(identity["dim"])


def _members(organs: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Tell which class belongs to which organ, bool ``(C, O)``."""
    member = np.array(
        [
            [bool(starts) and label.name.startswith(tuple(starts)) for starts in organs.values()]
            for label in load_labels("totalsegmentator")
        ]
    )
    if (member.sum(1) > 1).any():
        raise ValueError(
            f"organs must not share a class, got class {int((member.sum(1) > 1).argmax())} in two."
        )
    for place, name in enumerate(organs):
        member[:, place] |= (name == OTHER) & ~member.any(1)
    return member
