"""Views are drawn as the paper says, and their crops cut from the slices they need."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.transforms.multi_crop import (
    GUIDED_BY_REX,
    GUIDED_BY_TS,
    UNGUIDED,
    PositiveCells,
    RandSlabMultiCrop,
    ViewPlan,
    cut_crops,
    nearest_cells,
)
from tests.common.conftest import multi_crop as recipes_crop

SLAB_LEN, SHAPE, GRID = 7, (97, 131), 16
GLOBAL, LOCAL = slice(0, 2), slice(2, 10)
# Chance that a correct sampler fails one of the statistical checks below, each on a fixed seed.
SIGNIFICANCE = 1e-4


def multi_crop(**changes: Any) -> RandSlabMultiCrop:
    sizes = {"global_size_px": 32, "local_size_px": 16, "patch_size_px": 8}
    return recipes_crop(**sizes | changes)


def draws(
    crop: RandSlabMultiCrop, number: int, ts=None, rex=None, shape=SHAPE, slab_len=SLAB_LEN
) -> ViewPlan:
    """Many plans, stacked along a first axis."""
    plans = [crop.draw(np.random.default_rng([5, i]), slab_len, shape, ts, rex) for i in range(number)]
    return ViewPlan(*(np.stack(parts) for parts in zip(*plans, strict=True)))


def organ_mask() -> np.ndarray:
    """Foreground on about half of every slice."""
    mask = np.random.default_rng(0).integers(0, 118, (SLAB_LEN, GRID, GRID)).astype(np.uint8)
    mask[:, :, GRID // 2 :] = 0
    return mask


def finding_mask(*slices: int) -> np.ndarray:
    """A few cells with the 14th bit in the given slices."""
    mask = np.zeros((SLAB_LEN, GRID, GRID), np.uint16)
    for z in slices:
        mask[z, 3:5, z + 4] = 1 << 13
    return mask


def cells(plan: ViewPlan, guided: np.ndarray) -> tuple[np.ndarray, ...]:
    """Slice, row and column of the mask cell each guided view was centred on."""
    rows, columns = (np.floor(plan.points[guided] * GRID / SHAPE)).astype(int).T
    return plan.boxes[guided][:, 0], rows, columns


def check_share(hits: np.ndarray, probability: float) -> None:
    assert stats.binomtest(int(hits.sum()), hits.size, probability).pvalue > SIGNIFICANCE


# Drawing


def test_80_percent_of_global_and_of_local_views_are_guided():
    plan = draws(multi_crop(), 300, organ_mask(), finding_mask(*range(SLAB_LEN)))
    for views in (GLOBAL, LOCAL):
        check_share(plan.guide[:, views] != UNGUIDED, 0.8)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_guided_prob_at_its_ends_guides_no_or_every_view(prob):
    plan = draws(multi_crop(guided_prob=prob), 20, organ_mask())
    assert (plan.guide == (GUIDED_BY_TS if prob else UNGUIDED)).all()


def test_findings_come_before_organs():
    plan = draws(multi_crop(), 50, organ_mask(), finding_mask(*range(SLAB_LEN)))
    assert set(plan.guide.flat) == {UNGUIDED, GUIDED_BY_REX}
    plan = draws(multi_crop(), 50, organ_mask(), finding_mask())
    assert set(plan.guide.flat) == {UNGUIDED, GUIDED_BY_TS}


@pytest.mark.parametrize("ts", [None, np.zeros((SLAB_LEN, GRID, GRID), np.uint8)])
def test_without_positives_nothing_is_guided(ts):
    plan = draws(multi_crop(guided_prob=1), 20, ts, finding_mask())
    assert (plan.guide == UNGUIDED).all()
    assert np.isnan(plan.points).all()


@pytest.mark.parametrize("guidance", ["paper", "released"])
def test_guided_view_takes_the_slice_and_a_positive_cell_of_its_point(guidance):
    ts, rex = organ_mask(), finding_mask(1, 4)
    plan = draws(multi_crop(guidance=guidance), 150, ts, rex)
    for kind, mask in ((GUIDED_BY_TS, ts), (GUIDED_BY_REX, rex)):
        guided = plan.guide == kind
        assert guided.sum() > 20
        assert (mask[cells(plan, guided)] != 0).all()


def test_guided_global_view_uses_the_centre_slice_alone():
    plan = draws(multi_crop(guided_prob=1), 60, organ_mask(), finding_mask(0, 5))
    assert (plan.boxes[:, GLOBAL, 0] == SLAB_LEN // 2).all()
    assert (plan.guide[:, GLOBAL] == GUIDED_BY_TS).all()
    assert (plan.guide[:, LOCAL] == GUIDED_BY_REX).all()
    assert set(plan.boxes[:, LOCAL, 0].flat) == {0, 5}


def test_positions_are_uniform_over_the_positive_cells_of_the_slab():
    rex = np.zeros((SLAB_LEN, GRID, GRID), np.uint16)
    rex[1, 2, 3:6] = 1
    rex[4, 12, 15] = 2
    rex[6, 15, 0] = 4
    plan = draws(multi_crop(guided_prob=1), 150, None, rex)
    guided = plan.guide[:, LOCAL] == GUIDED_BY_REX
    assert guided.all()
    found = cells(ViewPlan(*(part[:, LOCAL] for part in plan)), guided)
    counts = np.zeros_like(rex, int)
    np.add.at(counts, found, 1)
    assert counts.sum() == counts[rex != 0].sum()
    assert stats.chisquare(counts[rex != 0]).pvalue > SIGNIFICANCE


def test_points_are_uniform_within_their_cell():
    rex = finding_mask()
    rex[SLAB_LEN // 2, 5, 9] = 1
    plan = draws(multi_crop(guided_prob=1), 100, None, rex)
    inside = (plan.points * GRID / SHAPE - (5, 9)).reshape(-1, 2)
    for axis in (0, 1):
        assert stats.kstest(inside[:, axis], "uniform").pvalue > SIGNIFICANCE


def test_released_guidance_leaves_globals_alone_and_keeps_the_slice_of_locals():
    ts, rex = organ_mask(), finding_mask(1, 4)
    ts[6] = 0
    plan = draws(multi_crop(guidance="released"), 400, ts, rex)
    assert (plan.guide[:, GLOBAL] == UNGUIDED).all()
    z, guide = plan.boxes[:, LOCAL, 0].ravel(), plan.guide[:, LOCAL].ravel()
    assert stats.chisquare(np.bincount(z, minlength=SLAB_LEN)).pvalue > SIGNIFICANCE
    with_finding = np.isin(z, (1, 4))
    assert set(guide[with_finding]) == {GUIDED_BY_REX, GUIDED_BY_TS}
    check_share(guide[with_finding] == GUIDED_BY_REX, 0.8)
    assert (guide[~with_finding & (z != 6)] == GUIDED_BY_TS).all()  # no 80 % gate
    assert (guide[z == 6] == UNGUIDED).all()


def test_scales_are_uniform_in_their_ranges():
    plan = draws(multi_crop(), 300, shape=(4001, 5003))
    for views, low, high in ((GLOBAL, 0.6, 1.0), (LOCAL, 0.3, 0.6)):
        scales = plan.boxes[:, views, 3].ravel() / 4001
        assert stats.kstest(scales, "uniform", (low, high - low)).pvalue > SIGNIFICANCE


def test_unguided_slices_are_uniform():
    z = draws(multi_crop(), 300).boxes[:, LOCAL, 0]
    assert stats.chisquare(np.bincount(z.ravel(), minlength=SLAB_LEN)).pvalue > SIGNIFICANCE


def test_unguided_boxes_are_uniform_over_all_places_inside():
    plan = draws(multi_crop(local_scale=(0.9, 0.9)), 300, shape=(20, 23))
    _, top, left, side = plan.boxes[:, LOCAL].reshape(-1, 4).T
    assert set(side) == {18}
    for corner, places in ((top, 3), (left, 6)):
        assert stats.chisquare(np.bincount(corner, minlength=places)).pvalue > SIGNIFICANCE
        assert corner.max() == places - 1


@pytest.mark.parametrize("shape", [(97, 131), (131, 97), (64, 64), (512, 511), (1, 3)])
def test_boxes_lie_inside_the_slice(shape):
    plan = draws(multi_crop(), 50, organ_mask(), finding_mask(2, 3), shape=shape)
    z, top, left, side = plan.boxes.reshape(-1, 4).T
    assert ((z >= 0) & (z < SLAB_LEN)).all()
    assert ((top >= 0) & (left >= 0) & (side >= 1)).all()
    assert ((top + side <= shape[0]) & (left + side <= shape[1])).all()


def test_guided_box_is_centred_on_its_point_and_shifted_inside():
    plan = draws(multi_crop(), 100, organ_mask(), finding_mask(2, 3))
    guided = plan.guide != UNGUIDED
    boxes, points = plan.boxes[guided], plan.points[guided]
    for axis in (0, 1):
        start, side, point, length = boxes[:, 1 + axis], boxes[:, 3], points[:, axis], SHAPE[axis]
        assert ((start <= point) & (point <= start + side)).all()
        free = (point >= side / 2 + 1) & (point <= length - side / 2 - 1)
        assert free.sum() > 50
        assert (np.abs(start + side / 2 - point)[free] <= 0.5 + 1e-4).all()
        assert (start[point < side / 2 - 1] == 0).all()
        assert ((start + side)[point > length - side / 2 + 1] == length).all()


def test_photometric_numbers_have_the_stated_distributions():
    plan = draws(multi_crop(), 400)
    has_gamma, has_blur = plan.gamma != 1, plan.blur_sigma != 0
    check_share(has_gamma, 0.8)
    check_share(has_blur[:, 0], 0.5)
    check_share(has_blur[:, 1], 0.1)
    assert not has_blur[:, LOCAL].any()
    assert stats.kstest(plan.gamma[has_gamma], "uniform", (0.9, 0.2)).pvalue > SIGNIFICANCE
    assert stats.kstest(plan.blur_sigma[has_blur], "uniform", (0.1, 1.9)).pvalue > SIGNIFICANCE


def test_nothing_is_flipped_unless_asked():
    assert not draws(multi_crop(), 20).flips.any()
    check_share(draws(multi_crop(flip_prob=0.5), 200).flips, 0.5)


def test_plan_is_a_function_of_the_generator():
    first, again, other = (
        multi_crop().draw(np.random.default_rng(seed), SLAB_LEN, SHAPE, organ_mask(), None)
        for seed in (3, 3, 4)
    )
    for part, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(part, same)
        assert part.dtype == different.dtype
    assert (first.boxes != other.boxes).any()


# Cutting


def test_crops_are_the_pixels_of_their_boxes_one_after_the_other():
    plan = multi_crop().draw(np.random.default_rng(0), SLAB_LEN, SHAPE, organ_mask(), finding_mask(2))
    slices = np.random.default_rng(1).integers(-1024, 3072, (SLAB_LEN, *SHAPE)).astype(np.int16)
    expected = [slices[z, top : top + side, left : left + side].ravel() for z, top, left, side in plan.boxes]
    pixels = cut_crops(plan.boxes, slices.__getitem__)
    assert pixels.dtype == np.int16
    np.testing.assert_array_equal(pixels, np.concatenate(expected))


def test_each_used_slice_is_read_once_and_no_other():
    read = []
    plan = multi_crop().draw(np.random.default_rng(0), 40, SHAPE, None, None)

    def read_slice(z: int) -> np.ndarray:
        read.append(z)
        return np.full(SHAPE, z, np.int16)

    cut_crops(plan.boxes, read_slice)
    assert sorted(read) == sorted(set(plan.boxes[:, 0].tolist()))


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_size_px": 256, "patch_size_px": 14}, "global_size_px must be .*got 256 and 14. Use 252"),
        ({"local_size_px": 3}, "local_size_px must be a multiple of patch_size_px, got 3 and 8. Use 8"),
        ({"patch_size_px": 0}, "global_size_px must be a multiple of patch_size_px, got 32 and 0"),
        ({"num_global": 0, "blur_probs": ()}, "num_global and num_local must be positive, got 0 and 8"),
        ({"num_local": 0}, "num_global and num_local must be positive, got 2 and 0"),
        ({"blur_probs": (0.5,)}, "blur_probs must have one entry per global view, got 1 for 2"),
        ({"blur_probs": (0.5, 1.5)}, "blur_probs must be between 0 and 1, got 1.5"),
        ({"guided_prob": -0.1}, "guided_prob must be between 0 and 1, got -0.1"),
        ({"gamma_prob": 2}, "gamma_prob must be between 0 and 1, got 2"),
        ({"flip_prob": math.nan}, "flip_prob must be between 0 and 1, got nan"),
        ({"guidance": "papers"}, r"guidance must be one of \('paper', 'released'\), got 'papers'"),
        ({"global_scale": (0.6, 1.1)}, r"global_scale must be .* of at most 1.0, got \[0.6, 1.1\]"),
        ({"local_scale": (0.6, 0.3)}, r"local_scale must be two increasing positive numbers"),
        ({"gamma_range": (0.9,)}, r"gamma_range must be two increasing positive numbers, got \[0.9\]"),
        ({"blur_sigma_range": (0, 2)}, r"blur_sigma_range must be two increasing .*got \[0, 2\]"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        multi_crop(**changes)


def test_masks_of_another_slab_are_refused():
    with pytest.raises(ValueError, match=r"rex must have shape .*got \(7, 16, 16\) for 6 slices"):
        multi_crop().draw(np.random.default_rng(0), SLAB_LEN - 1, SHAPE, None, finding_mask(1))
    with pytest.raises(ValueError, match="slab_len must be positive, got 0"):
        multi_crop().draw(np.random.default_rng(0), 0, SHAPE, None, None)


def test_each_view_can_have_its_own_chance_of_guidance() -> None:
    probs = [0.0, 1.0, *[0.0] * 5, *[1.0] * 3]
    plan = draws(multi_crop(guided_prob=probs), 300, ts=organ_mask())
    assert (plan.guide[:, [0, *range(2, 7)]] == UNGUIDED).all()
    assert (plan.guide[:, [1, 7, 8, 9]] == GUIDED_BY_TS).all()
    with pytest.raises(ValueError, match="guided_prob must be one .*got 2 for 10 views"):
        multi_crop(guided_prob=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"guided_prob must be between 0 and 1, got 1.5"):
        multi_crop(guided_prob=[*[0.5] * 9, 1.5])


def nearest_resize(length: int, size: int) -> list[int]:
    """Input index under the centre of every output pixel, in whole numbers."""
    return [((2 * i + 1) * length) // (2 * size) for i in range(size)]


@pytest.mark.parametrize("length", [512, 768, 333, 101, 128, 127])
@pytest.mark.parametrize(("share", "size"), [(1.0, 256), (0.6, 224), (0.3, 144), (0.45, 17)])
def test_cells_equal_enlarge_crop_and_resize_step_by_step(length, share, size):
    grid = 128
    enlarged = np.arange(grid)[nearest_resize(grid, length)]
    side = int(length * share)
    starts = [0, (length - side) // 3, length - side]
    many = [torch.tensor(values) for values in (starts, [side] * 3, [length] * 3)]
    found = nearest_cells(many[0], many[1], size, many[2], grid)
    for cells, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(cells, enlarged[start : start + side][nearest_resize(side, size)])


@pytest.mark.parametrize("shape", [(5, 11, 7), (1, 3, 70), (4, 128, 128)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_rank_is_the_cell_that_a_search_through_the_mask_finds(shape, dtype):
    rng = np.random.default_rng(0)
    mask = rng.integers(1, 118, shape).astype(dtype) * (rng.random(shape) < 0.1)
    mask[0] = 0 if shape[0] > 1 else mask[0]
    if dtype == np.uint16:
        mask[mask > 0] = 1 << 13  # whose low byte is 0
    expected = np.argwhere(mask != 0)
    cells = PositiveCells(mask)
    assert cells.by_slice.tolist() == [(one != 0).sum() for one in mask]
    slices, places = cells.take(np.arange(len(expected)))
    np.testing.assert_array_equal(np.column_stack([slices, places]), expected)
    assert len(expected) > 10
