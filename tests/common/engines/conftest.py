"""Data on which pretraining steps are computed by hand."""

import numpy as np
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
