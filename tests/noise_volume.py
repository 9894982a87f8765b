"""A volume of noise on its way into shards, for tests that need some volume."""

from typing import Any

import numpy as np

from common.shards.codec import NUM_TS_CLASSES, REX_CODES
from common.shards.writer import VolumeSlices


def noise_volume(
    volume: str = "train_1_a_1",
    num_slices: int = 3,
    shape: tuple[int, int] = (11, 13),
    *,
    ts: bool = True,
    rex: bool = False,
    **fields: Any,
) -> VolumeSlices:
    """Random HU, organs and, if wanted, findings, which differ from name to name; any field can be stated."""
    rng = np.random.default_rng(list(volume.encode()))
    masks = (num_slices, 128, 128)
    findings = (rng.random(masks) < 0.01) * rng.integers(1, 1 << len(REX_CODES), masks)
    made = {
        "ct": rng.integers(-1024, 3072, (num_slices, *shape)).astype(np.int16),
        "ts": rng.integers(0, NUM_TS_CLASSES, masks).astype(np.uint8) if ts else None,
        "rex": findings.astype(np.uint16) if rex else None,
        "spacing_mm": (0.7, 0.8, 1.5),
        "original_axcodes": "LPS",
        "labels": None,
        "split": "train",
        "source": f"in/{volume}.nii.gz",
        "source_sha256": volume.encode().hex().zfill(64)[:64],
    } | fields
    num_slices, *size = made["ct"].shape
    return VolumeSlices(volume, original_shape=(*size[::-1], num_slices), **made)
