"""Slabs span their thickness, round half up, and tile a volume without gaps."""

import math
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pytest

from common.shards.slabs import slab_num_slices, slab_starts


@pytest.mark.parametrize(
    ("spacing_z_mm", "expected"),
    [
        (0.5, 24),
        (0.8, 15),
        (1.0, 12),
        (1.25, 10),
        (1.5, 8),
        (2.0, 6),
        (2.5, 5),
        (3.0, 4),
        (4.8, 3),
        (5.0, 2),
        (6.0, 2),
    ],
)
def test_12_mm_slab_has_the_slices_that_span_it(spacing_z_mm, expected):
    assert slab_num_slices(spacing_z_mm, 12.0) == expected


def test_length_is_the_decimal_quotient_rounded_half_up():
    for hundredths in range(50, 601):
        exact = Decimal(1200) / Decimal(hundredths)
        assert slab_num_slices(hundredths / 100, 12.0) == exact.quantize(Decimal(1), ROUND_HALF_UP)


def test_half_rounds_up_for_a_float32_header_too():
    assert float(np.float32(4.8)) > 4.8
    assert slab_num_slices(float(np.float32(4.8)), 12.0) == 3
    assert slab_num_slices(float(np.float32(0.8)), 0.4) == 1
    assert slab_num_slices(8.0, 12.0) == 2


def test_slab_has_at_least_one_slice():
    assert slab_num_slices(30.0, 12.0) == 1
    assert slab_num_slices(1.0, 0.0) == 1  # pure 2D


@pytest.mark.parametrize("spacing", [math.nan, 0.0, -1.0, math.inf])
def test_spacing_that_is_no_distance_is_refused_with_the_volume(spacing):
    with pytest.raises(
        ValueError,
        match=f"spacing_mm must be positive to cut 12.0 mm slabs, got {spacing} for volume 'train_1_a_1'",
    ):
        slab_num_slices(spacing, 12.0, "train_1_a_1")
    with pytest.raises(ValueError, match=rf"got {spacing}\. Prepare the shards again"):
        slab_num_slices(spacing, 12.0)


@pytest.mark.parametrize("slab_mm", [-12.0, math.nan, math.inf])
def test_thickness_that_is_none_is_refused(slab_mm):
    with pytest.raises(ValueError, match=f"slab_mm must be positive, or 0 for single slices, got {slab_mm}"):
        slab_num_slices(1.0, slab_mm)


@pytest.mark.parametrize("num_slices", [1, 2, 11, 12, 13, 23, 24, 25, 97])
@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_slabs_cover_every_slice_at_full_length(num_slices, length):
    starts = slab_starts(num_slices, length)
    taken = min(length, num_slices)
    covered = {int(start) + i for start in starts for i in range(taken)}
    assert covered == set(range(num_slices))
    assert len(starts) == math.ceil(num_slices / length)
    assert len(set(starts.tolist())) == len(starts)


def test_slabs_tile_from_the_feet_and_the_last_ends_at_the_head():
    np.testing.assert_array_equal(slab_starts(24, 12), [0, 12])
    np.testing.assert_array_equal(slab_starts(25, 12), [0, 12, 13])
    np.testing.assert_array_equal(slab_starts(7, 12), [0])


@pytest.mark.parametrize(("num_slices", "length"), [(0, 12), (5, 0), (-3, 2)])
def test_empty_volumes_and_slabs_are_refused(num_slices, length):
    with pytest.raises(ValueError, match=f"must be positive, got {num_slices} and {length}"):
        slab_starts(num_slices, length)
