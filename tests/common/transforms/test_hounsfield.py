"""HU windows have one home, and normalisation is a clip and a z-score."""

import math

import pytest
import torch

from common.ct.geometry import STORED_HU_RANGE
from common.transforms.hounsfield import (
    HU_WINDOWS,
    HUWindow,
    hu_window,
    normalize_hu,
)


def test_windows_hold_the_published_statistics():
    assert hu_window("ct_rate") == (-997.0, 888.0, -142.39, 360.97)
    assert hu_window("dale_ct_0_l") == (-940.8, 923.1, -25.03, 246.87)


def test_shards_keep_more_than_any_window_shows():
    for window in HU_WINDOWS.values():
        assert STORED_HU_RANGE[0] <= window.min_hu < window.max_hu <= STORED_HU_RANGE[1]


def test_four_numbers_make_a_window_and_a_window_stays_itself():
    assert hu_window([-1000, 400, -20, 300]) == HUWindow(-1000.0, 400.0, -20.0, 300.0)
    assert hu_window(HU_WINDOWS["ct_rate"]) == HU_WINDOWS["ct_rate"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-997, 888, -142.39], r"hu_window must be four finite numbers .*got \[-997.0, 888.0, -142.39\]"),
        ([-997, math.nan, 0, 1], "hu_window must be four finite numbers"),
        ([888, -997, 0, 1], "min_hu must be below max_hu, got 888.0 and -997.0"),
        ([-997, 888, 0, 0], "std_hu must be positive, got 0.0"),
    ],
)
def test_numbers_that_make_no_window_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        hu_window(values)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"one of \['ct_rate', 'dale_ct_0_l'\] or four numbers, got 'ct-rate'"):
        hu_window("ct-rate")


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
def test_normalisation_of_a_ct_is_clip_and_z_score_by_hand(dtype):
    hu = torch.tensor([[-1024, -997, -142], [0, 888, 3071]], dtype=dtype)
    by_hand = [
        [(-997 + 142.39) / 360.97, (-997 + 142.39) / 360.97, (-142 + 142.39) / 360.97],
        [142.39 / 360.97, (888 + 142.39) / 360.97, (888 + 142.39) / 360.97],
    ]
    normalised = normalize_hu(hu, HU_WINDOWS["ct_rate"])
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, torch.tensor(by_hand))
