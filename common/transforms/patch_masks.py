"""iBOT's masks: which patches of the global views the student does not see."""

# Vg global views, P patches of a view (side x side), M masked patches of a batch with padding

import math

import numpy as np
import torch

SAMPLES_TOGETHER = 8
"""Samples whose views share out mask ratios among them; see ``PatchMasks``. Our choice."""

MASKS = 3
"""Second word of the random streams of masks; ``SlabViews`` has 0 to 2."""

MIN_BLOCK_PATCHES = 4
ASPECTS = (0.3, 1 / 0.3)
TRIES = 10
"""Smallest block, range of height over width, draws in a row that may fail. Source: BEiT and DINOv2."""


class PatchMasks:
    """Draw block-wise masks for the global views of a slab.

    Of the ``8 Vg`` global views of eight slabs in a row exactly ``mask_sample_prob`` are masked, and each
    of them draws its ratio from its own part of ``mask_ratio``, as DINOv2 shares them out over the batch of a
    GPU. Eight instead of a batch make the masks of a slab a function of the seed and its place in the run,
    whatever the number of ranks, and the number of masked patches of a batch has a small fixed bound. A mask
    is made of rectangles, each of at least 4 patches and between 0.3 and 3.3 times as high as wide, until the
    number of patches is reached or ten draws in a row do not fit.

    Source: BEiT, arXiv:2106.08254, Alg. 1; DINOv2. Probability and ratio: DALE-CT III-B.

    Args:
        global_size_px: side of a global view.
        patch_size_px: side of a patch.
        num_global: Vg.
        seed: seed of everything random.
        mask_sample_prob: share of the global views that have a mask. Paper: 0.5.
        mask_ratio: range of the share of masked patches in such a view. Paper: 0.1-0.5.

    Raises:
        ValueError: if ``mask_sample_prob`` or ``mask_ratio`` is out of range, or no view is masked.
    """

    def __init__(
        self,
        *,
        global_size_px: int,
        patch_size_px: int,
        num_global: int,
        seed: int,
        mask_sample_prob: float,
        mask_ratio: tuple[float, float],
    ) -> None:
        if not 0 < mask_sample_prob <= 1:
            raise ValueError(f"mask_sample_prob must be above 0 and at most 1, got {mask_sample_prob}.")
        if len(mask_ratio) != 2 or not 0 < mask_ratio[0] <= mask_ratio[1] <= 1:
            raise ValueError(
                f"mask_ratio must be two increasing numbers above 0 and at most 1, got {list(mask_ratio)}."
            )
        self.grid = grid = global_size_px // patch_size_px
        self.num_global = num_global
        self.seed = seed
        self.num_masked = int(SAMPLES_TOGETHER * num_global * mask_sample_prob)
        if self.num_masked < 1 or int(grid * grid * mask_ratio[1]) < 1:
            raise ValueError(
                f"mask_sample_prob and mask_ratio must mask a patch of {SAMPLES_TOGETHER} samples, "
                f"got {mask_sample_prob} and {list(mask_ratio)} for {num_global} views of {grid**2} patches."
            )
        self.ratios = np.linspace(*mask_ratio, self.num_masked + 1)

    def draw(self, place: int) -> np.ndarray:
        """Return the masks of a slab, bool (Vg, P), from its place in the run."""
        group, member = divmod(place, SAMPLES_TOGETHER)
        shared = np.random.default_rng([self.seed, MASKS, group, 0])
        parts = shared.permutation(SAMPLES_TOGETHER * self.num_global)
        rng = np.random.default_rng([self.seed, MASKS, place, 0, 1])
        masks = np.zeros((self.num_global, self.grid, self.grid), bool)
        for view, part in enumerate(parts[member * self.num_global : (member + 1) * self.num_global]):
            if part < self.num_masked:
                share = rng.uniform(self.ratios[part], self.ratios[part + 1])
                masks[view] = block_mask(rng, self.grid, int(self.grid**2 * share))
        return masks.reshape(self.num_global, -1)

    def most_masked(self, batch_size: int) -> int:
        """Return the largest number of masked patches that a batch of slabs in a row can have."""
        largest = (self.grid**2 * self.ratios[1:]).astype(int)
        groups = math.ceil((batch_size - 1) / SAMPLES_TOGETHER) + 1
        if batch_size % SAMPLES_TOGETHER == 0:  # a rank's share then starts with a group
            groups -= 1
        return int(min(groups * largest.sum(), batch_size * self.num_global * largest[-1]))


def block_mask(rng: np.random.Generator, grid: int, num_patches: int) -> np.ndarray:
    """Draw a mask of rectangles, bool (grid, grid), with at most ``num_patches`` patches."""
    mask = np.zeros((grid, grid), bool)
    missing, failures = num_patches, 0
    while missing > 0 and failures < TRIES:
        area = rng.uniform(min(MIN_BLOCK_PATCHES, missing), missing)
        aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if not (0 < height < grid and 0 < width < grid):
            continue
        top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(block.sum())
        if 0 < new <= missing:
            block[:] = True
            missing, failures = missing - new, 0
    return mask


def masked_places(masks: torch.Tensor, bound: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the masked patches of a batch are, in a fixed number of entries, and their weights.

    Args:
        masks: ``(B, Vg, P)`` bool.
        bound: M entries; those that are not needed point to the first patch with weight 0.

    Returns:
        int64 ``(M,)``, places among all ``B Vg P``; float32 ``(M,)``, one over the view's masked patches.

    Raises:
        ValueError: if there are more masked patches than entries.
    """
    found = masks.flatten().nonzero().flatten()
    if len(found) > bound:
        raise ValueError(f"masks must hold at most {bound} masked patches, got {len(found)}.")
    by_view = 1 / masks.sum(-1, keepdim=True).clamp(min=1).float()
    places, weights = torch.zeros(bound, dtype=torch.int64), torch.zeros(bound)
    places[: len(found)] = found
    weights[: len(found)] = by_view.expand(masks.shape).flatten()[found]
    return places, weights
