"""Data on which pretraining steps are computed by hand, and CTs for a tiny encoder."""

import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from torch.utils.data import Dataset

from common.shards.slab_dataset import StepBatches, StepLoader
from common.transforms.patch_masks import PatchMasks, masked_places
from common.transforms.view_batch import collate_views

SIDES, SHAPE = np.array([16, 16, 8, 8, 8]), (20, 20)


class StepSamples(Dataset):
    """A sample is a function of its position, as ``SlabViews``' are; each view as large as its crop.

    The mask grid is the slice's, so that a mask's part in the box is the mask of the view.
    """

    masks = PatchMasks(
        **{"global_size_px": 16, "patch_size_px": 8, "num_global": 2, "seed": 3},
        **{"mask_sample_prob": 0.5, "mask_ratio": (0.3, 0.8)},
    )

    def __getitem__(self, position: int) -> dict:
        rng = np.random.default_rng(position)
        corners = [rng.integers(0, 20 - side, 2) for side in SIDES]
        boxes = [(0, *corner, side) for corner, side in zip(corners, SIDES, strict=True)]
        rare = rng.random((5, *SHAPE)) < 0.05
        hu = [rng.integers(-1024, 1000, side * side).astype(np.int16) for side in SIDES]
        return {
            "position": position,
            "volume": f"train_{position}",
            "has_ts": True,
            "has_rex": position % 3 == 0,
            "global_pixels": np.concatenate(hu[:2]),
            "local_pixels": np.concatenate(hu[2:]),
            "boxes": np.array(boxes, np.int32),
            "flips": np.zeros(5, bool),
            "gamma": np.ones(5, np.float32),
            "blur_sigma": np.zeros(5, np.float32),
            "shape": np.array(SHAPE, np.int32),
            "ts_planes": rng.integers(0, 118, (5, *SHAPE)).astype(np.uint8),
            "rex_planes": (rng.integers(0, 2**14, (5, *SHAPE)) * rare).astype(np.int16),
            "ts_plane": np.arange(5),
            "rex_plane": np.arange(5),
            "masks": self.masks.draw(position),
        }

    def collate(self, samples: list) -> dict:
        batch = collate_views(samples, 2, (16, 8), patch_size_px=8)
        places, weights = masked_places(batch["masks"], self.masks.most_masked(len(samples)))
        return batch | {"masked_places": places, "masked_weights": weights}

    def step(self, number: int) -> dict:
        """The batch of a step, from 1."""
        return self.collate([self[position] for position in range(5 * number - 5, 5 * number)])


def step_loader() -> StepLoader:
    return StepLoader(StepSamples(), StepBatches(5, rank=0, world_size=1))


TINY = {
    **{"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    **{"layer_scale_init": 1.0, "amp_dtype": "float32", "embedding_dtype": "float32", "num_workers": 0},
    **{"encoder_weights": None, "seed": 42},
}
"""Knobs of dale_ct_2s that take no time."""


def save_ct(path: Path, hu: np.ndarray, spacing_mm: float = 8.0) -> None:
    """Save canonical slices of 6 mm a pixel as LPS."""
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-6.0, -6.0, spacing_mm, 1.0])), path)


def trunk(seed: int, num_slices: int) -> np.ndarray:
    """A body of 44 x 52 px, off the middle, with a spine, and lungs in all slices but the two at the ends."""
    hu = np.full((num_slices, 64, 64), -1000, np.int16)
    hu[:, 16:60, 8:60] = np.random.default_rng(seed).integers(-100, 200, (num_slices, 44, 52))
    hu[:, 52:58, 30:35] = 400
    hu[1:-1, 24:52, 14:30] = hu[1:-1, 24:52, 38:54] = -850
    return hu


@pytest.fixture
def cts(tmp_path: Path) -> Path:
    for seed, name in enumerate(("p1", "p2")):
        save_ct(tmp_path / "ct" / f"{name}.nii.gz", trunk(seed, 23 + seed))
    return tmp_path / "ct"


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found[1])
