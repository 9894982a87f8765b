import numpy as np
import pytest

from common.ct.checks import find_doubts, judge
from data_prep.audit.volume import VolumeDecoder, greatest_step
from data_prep.phantom.population import roster
from data_prep.phantom.scan import render

SHAPE = (30, 20)
SPACING_MM = (0.5, 0.75, 2.0)


@pytest.fixture(params=[slice(None), slice(None, None, -1)], ids=["upright", "head_down"])
def turned(request: pytest.FixtureRequest) -> np.ndarray:
    scan = render(roster(1, seed=2)[0], "a", 96, (3.0, 3.0), {})
    return scan.hu.clip(-1024, 3071)[request.param]


def content(ct: np.ndarray, **masks: np.ndarray) -> object:
    decoder = VolumeDecoder(len(ct), ct.shape[1:], SPACING_MM, "ts" in masks)
    for z in np.random.default_rng(0).permutation(len(ct)):
        planes = [masks[name][z] if name in masks else None for name in ("ts", "rex")]
        decoder.add(int(z), ct[z], *planes)
    assert not decoder.missing
    return decoder.content()


def test_hu_statistics_are_those_of_all_voxels() -> None:
    ct = np.random.default_rng(1).integers(-1024, 3072, (9, *SHAPE)).astype(np.int16)
    found = content(ct)
    low, median, high = np.percentile(ct, [1, 50, 99], method="inverted_cdf")
    assert found.hu_percentiles == (low, median, high)
    np.testing.assert_array_equal(found.hu_counts, np.histogram(ct, 128, (-1024, 3072))[0])


def test_size_is_in_millimetres_and_blank_slices_are_counted() -> None:
    ct = np.random.default_rng(2).integers(-1000, 500, (8, *SHAPE)).astype(np.int16)
    ct[2], ct[7] = -1024, 40
    measures = content(ct).measures
    assert measures["length"] == 8 * 2.0
    assert (measures["depth"], measures["width"]) == (30 * 0.75, 20 * 0.5)
    assert measures["blank"] == 2


def test_the_audit_answers_as_a_reader_of_the_whole_volume(turned) -> None:
    decoder = VolumeDecoder(len(turned), turned.shape[1:], (3.5, 3.5, 3.0), has_ts=False)
    for z in np.random.default_rng(0).permutation(len(turned)):
        decoder.add(int(z), turned[z], None, None)
    doubts, _ = find_doubts(turned, (3.5, 3.5, 3.0))
    assert judge(decoder.content().measures) == doubts


def test_masks_are_counted_by_class_and_slice() -> None:
    ct = np.zeros((4, *SHAPE), np.int16)
    ts = np.zeros((4, 128, 128), np.uint8)
    ts[1, 3, 4:9] = 51
    rex = np.zeros((4, 128, 128), np.uint16)
    rex[1:3, 0, 0] = 1 << 13 | 1
    rex[3, 5, 5] = 1
    found = content(ct, ts=ts, rex=rex)
    assert (found.organ_voxels[51], found.organ_voxels.sum()) == (5, ts.size)
    assert found.finding_slices.tolist() == [3, *[0] * 12, 2]
    assert content(ct).organ_voxels.sum() == 0


def test_a_slice_in_the_wrong_place_stands_out() -> None:
    smooth = np.cumsum(np.random.default_rng(3).normal(0, 20, (40, 16, 16)), axis=0)
    smooth = np.repeat(smooth, 2, axis=1)
    assert greatest_step(smooth) < 1.1
    order = np.arange(40)
    order[[5, 30]] = order[[30, 5]]
    assert greatest_step(smooth[order]) > 1.3
    by_name = sorted(range(40), key=str)
    assert greatest_step(smooth[by_name]) > 1.3
    assert np.isnan(greatest_step(np.zeros((5, 8, 8))))
    assert np.isnan(greatest_step(smooth[:2]))
