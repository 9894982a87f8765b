"""Samples of slices of different sizes become one batch without losing a pixel."""

import numpy as np
import torch

from common.transforms.view_batch import collate_views, on_device
from tests.common.conftest import multi_crop


def scans() -> list[dict]:
    rng = np.random.default_rng(0)
    ts = rng.integers(0, 118, (4, 128, 128)).astype(np.uint8)
    ts[1] = 0
    rex = np.zeros((4, 128, 128), np.uint16)
    rex[2, 5, 6] = 1 << 13
    shapes = ((4, 64, 50), (4, 97, 131), (2, 33, 40))
    hu = [rng.integers(-1024, 3072, shape).astype(np.int16) for shape in shapes]
    return [{"hu": hu[0], "ts": ts}, {"hu": hu[1], "ts": ts, "rex": rex, "labels": {"a": 1}}, {"hu": hu[2]}]


def samples_of(slabs_of, **changes) -> list[dict]:
    slabs = slabs_of(scans(), multi_crop(32, 16, 8), **changes)
    return [slabs[place] for place in range(3)]


def test_pixels_of_each_sample_are_found_by_the_sides_of_its_boxes(slabs_of):
    samples = samples_of(slabs_of)
    batch = collate_views(samples, num_global=2, sizes_px=(32, 16), patch_size_px=8)
    for group, views in (("global", slice(0, 2)), ("local", slice(2, None))):
        areas = batch["boxes"][:, views, 3].long().square().sum(1).tolist()
        for part, sample in zip(batch[f"{group}_pixels"].split(areas), samples, strict=True):
            np.testing.assert_array_equal(part.numpy(), sample[f"{group}_pixels"])


def test_planes_are_numbered_through_after_an_empty_one(slabs_of):
    samples = samples_of(slabs_of)
    batch = collate_views(samples, num_global=2, sizes_px=(32, 16), patch_size_px=8)
    for mask, dtype in (("ts", torch.uint8), ("rex", torch.int16)):
        planes = batch[f"{mask}_planes"]
        assert planes.dtype == dtype
        assert not planes[0].any()
        assert len(planes) == 1 + sum(len(sample[f"{mask}_planes"]) for sample in samples)
        for numbers, sample in zip(batch[f"{mask}_plane"], samples, strict=True):
            for number, own in zip(numbers.tolist(), sample[f"{mask}_plane"], strict=True):
                assert (number == 0) == (own < 0)
                if number:
                    np.testing.assert_array_equal(planes[number], sample[f"{mask}_planes"][own])


def test_facts_are_stacked_and_whole_numbers_stay_off_the_device(slabs_of):
    samples = samples_of(slabs_of)
    batch = collate_views(samples, num_global=2, sizes_px=(32, 16), patch_size_px=8)
    assert batch["volume"] == [sample["volume"] for sample in samples]
    assert batch["position"].tolist() == [0, 1, 2]
    assert batch["position"].dtype == torch.int64
    assert batch["has_rex"].dtype == torch.bool
    assert batch["labels"].tolist() == [sample["labels"].tolist() for sample in samples]
    assert batch["labels"].dtype == torch.int8
    assert batch["shape"].tolist() == [sample["shape"].tolist() for sample in samples]
    assert (batch["num_global"], batch["sizes_px"]) == (2, [32, 16])
    sides = np.stack([sample["boxes"][:, 3] for sample in samples])
    assert batch["largest_px"] == [sides[:, :2].max(), sides[:, 2:].max()]


def test_a_batch_without_masks_has_no_planes(slabs_of):
    batch = collate_views(samples_of(slabs_of, with_masks=False), 2, (32, 16), 8)
    assert not {"ts_planes", "ts_plane", "rex_planes", "rex_plane", "most_cells"} & batch.keys()


def test_only_what_is_named_goes_to_the_device():
    given = {"pixels": torch.zeros(2), "labels": torch.zeros(3), "volume": ["a"], "num_global": 2}
    batch = on_device(given, ["pixels", "planes"], torch.device("meta"))
    assert batch.keys() == given.keys()
    assert batch["pixels"].device.type == "meta"
    assert all(batch[name] is given[name] for name in ("labels", "volume", "num_global"))
