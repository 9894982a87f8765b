"""Masks have the paper's shares, are blocks, and are functions of seed and place."""

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from common.transforms.patch_masks import PatchMasks, block_mask, masked_places

GRID = 16


def patch_masks(**changes) -> PatchMasks:
    sizes = {"global_size_px": 8 * GRID, "patch_size_px": 8, "num_global": 2}
    return PatchMasks(**{**sizes, "seed": 5, "mask_sample_prob": 0.5, "mask_ratio": (0.1, 0.5), **changes})


def drawn(places: int, **changes) -> np.ndarray:
    masks = patch_masks(**changes)
    return np.stack([masks.draw(place) for place in range(places)])


def test_half_of_the_views_are_masked_by_a_tenth_to_a_half():
    masks = drawn(400)
    masked = masks.any(-1)
    assert masked.mean() == 0.5  # exactly, in any eight samples in a row
    assert (masked.reshape(50, 16).sum(1) == 8).all()
    ratios = masks.mean(-1)[masked]
    assert ratios.max() <= 0.5
    # uniform from .1 to .5 up to rounding down to patches, and to a block that did not fit
    assert abs(ratios.mean() - 0.3) < 0.01
    assert np.quantile(ratios, [0.05, 0.95]) == pytest.approx([0.12, 0.48], abs=0.02)


def test_which_views_are_masked_and_where_is_left_to_chance():
    masks = drawn(800)
    masked = masks.any(-1)
    both = masked.all(1).mean()  # of 16 views 8: two given ones with 8/16 * 7/15
    assert stats.binomtest(int(both * 800), 800, 8 * 7 / (16 * 15)).pvalue > 1e-4
    assert stats.binomtest(int(masked[:, 0].sum()), 800, 0.5).pvalue > 1e-4
    by_patch = masks.mean((0, 1)).reshape(GRID, GRID)
    torch.testing.assert_close(by_patch.mean(), 0.15, rtol=0, atol=0.01)
    assert by_patch.min() > 0.005  # corners are reached as well, if by few blocks
    assert abs(by_patch[: GRID // 2].mean() - by_patch[GRID // 2 :].mean()) < 0.02


def test_masks_are_made_of_blocks():
    pieces = [
        ndimage.label(mask.reshape(GRID, GRID))[1] for mask in drawn(200).reshape(400, -1) if mask.any()
    ]
    scattered = np.random.default_rng(0).random((GRID, GRID)) < 0.3
    assert np.mean(pieces) < 6 < 20 < ndimage.label(scattered)[1]


@pytest.mark.parametrize("num_patches", [1, 3, 10, 77, 128, 250])
def test_a_mask_reaches_its_number_of_patches_and_never_exceeds_it(num_patches):
    counts = [block_mask(np.random.default_rng(seed), GRID, num_patches).sum() for seed in range(100)]
    assert max(counts) <= num_patches
    assert np.mean(counts) > 0.85 * num_patches


def test_masks_are_functions_of_seed_and_place():
    masks = patch_masks(seed=1)
    backwards = [masks.draw(place) for place in reversed(range(20))][::-1]
    assert all(np.array_equal(masks.draw(place), mask) for place, mask in enumerate(backwards))
    others = [patch_masks(seed=2).draw(place) for place in range(20)]
    assert sum(np.array_equal(a, b) for a, b in zip(backwards, others, strict=True)) < 8


@pytest.mark.parametrize("batch_size", [1, 3, 8, 12, 16])
@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.3, 0.3)])
def test_no_batch_of_a_rank_has_more_masked_patches_than_the_bound(batch_size, ratio):
    masks = patch_masks(global_size_px=48, num_global=3, mask_ratio=ratio)
    all_masks = np.stack([masks.draw(place) for place in range(batch_size * 40)])
    counts = all_masks.reshape(40, -1).sum(1)
    assert counts.max() <= masks.most_masked(batch_size)


def test_the_bound_of_the_papers_batch_is_close_to_what_is_masked():
    bound = patch_masks().most_masked(48)
    assert 48 * 2 * 256 * 0.15 < bound < 1.1 * 48 * 2 * 256 * 0.15


def test_places_and_weights_are_those_of_a_loop():
    masks = torch.from_numpy(drawn(5, global_size_px=32, mask_ratio=(0.2, 0.5)))
    places, weights = masked_places(masks, bound=60)
    expected = [
        (sample * 32 + view * 16 + patch, 1 / masks[sample, view].sum().item())
        for sample in range(5)
        for view in range(2)
        for patch in range(16)
        if masks[sample, view, patch]
    ]
    assert places[: len(expected)].tolist() == [place for place, _ in expected]
    assert weights[: len(expected)].tolist() == pytest.approx([weight for _, weight in expected])
    assert places.shape == weights.shape == (60,)
    assert (weights[len(expected) :] == 0).all()
    assert weights.sum() == pytest.approx(masks.any(-1).sum().item())
    with pytest.raises(ValueError, match=f"at most 1 masked patches, got {len(expected)}"):
        masked_places(masks, bound=1)


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="sample_prob must be above 0 and at most 1, got 0"):
        patch_masks(mask_sample_prob=0)
    with pytest.raises(ValueError, match=r"ratio must be two increasing numbers .* got \[0.5, 0.1\]"):
        patch_masks(mask_ratio=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"must mask a patch of 8 samples, got 0.01 .* for 2 views of 256"):
        patch_masks(mask_sample_prob=0.01)
