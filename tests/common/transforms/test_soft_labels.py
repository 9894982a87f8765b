"""Soft labels against one-hot average and max pooling."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from common.transforms.soft_labels import coverage_fractions, finding_fractions, finding_presence

FUNCTIONS = [coverage_fractions, finding_presence, finding_fractions]
N, PATCH = 3, 7
HEIGHT, WIDTH = 2 * PATCH, 5 * PATCH  # unequal, so that transposed patches fail


def class_maps(num_classes: int) -> torch.Tensor:
    """Blocks of one class with some noise; not all classes occur."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, num_classes, (N, 1, 3, 4), generator=generator).float()
    maps = functional.interpolate(coarse, size=(HEIGHT, WIDTH))[:, 0].long()
    noise = torch.rand(maps.shape, generator=generator) < 0.1
    return torch.where(noise, torch.randint(0, num_classes, maps.shape, generator=generator), maps).to(
        torch.uint8
    )


def bit_planes(num_classes: int) -> torch.Tensor:
    """Each finding in a few pixels, overlapping; the last in none."""
    generator = torch.Generator().manual_seed(1)
    shown = torch.rand(num_classes, N, HEIGHT, WIDTH, generator=generator) < 0.02
    shown[-1] = False
    shown[0, 0, :PATCH, :PATCH] = True
    weights = 2 ** torch.arange(num_classes)
    return (shown.long() * weights[:, None, None, None]).sum(0).to(torch.int16)


def one_hot(ts: torch.Tensor, num_classes: int) -> torch.Tensor:
    return functional.one_hot(ts.long(), num_classes).movedim(-1, 1).double()


def unpacked(rex: torch.Tensor, num_classes: int) -> torch.Tensor:
    rows = [
        [[[(int(v) >> k) & 1 for v in row] for row in view] for k in range(num_classes)]
        for view in rex.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def row_major(pooled: torch.Tensor) -> torch.Tensor:
    return pooled.flatten(2).transpose(1, 2).float()


@pytest.mark.parametrize("num_classes", [11, 118])
def test_coverage_is_exactly_one_hot_average_pooling(num_classes: int) -> None:
    ts = class_maps(num_classes)
    expected = one_hot(ts, num_classes)
    cls, patches = coverage_fractions(ts, PATCH, num_classes)
    assert cls.dtype == patches.dtype == torch.float32
    assert torch.equal(cls, expected.mean((2, 3)).float())
    torch.testing.assert_close(patches, row_major(functional.avg_pool2d(expected, PATCH)), rtol=1e-7, atol=0)
    # the same rounding as float32 pooling
    assert torch.equal(patches, row_major(functional.avg_pool2d(expected.float(), PATCH)))


def test_coverage_of_a_view_is_the_mean_over_its_patches_and_sums_to_one() -> None:
    cls, patches = coverage_fractions(class_maps(11), PATCH, 11)
    torch.testing.assert_close(patches.sum(-1), torch.ones(N, 2 * 5))
    torch.testing.assert_close(patches.mean(1), cls)


def test_background_counts_as_a_class() -> None:
    cls, patches = coverage_fractions(torch.zeros(1, PATCH, PATCH, dtype=torch.uint8), PATCH)
    assert cls.shape == (1, 118)
    assert patches.shape == (1, 1, 118)
    assert cls[0, 0] == patches[0, 0, 0] == 1


def test_presence_is_max_pooling_of_every_bit() -> None:
    rex = bit_planes(14)
    expected = unpacked(rex, 14)
    cls, patches = finding_presence(rex, PATCH)
    assert cls.dtype == patches.dtype == torch.float32
    assert torch.equal(cls, expected.amax((2, 3)).float())
    assert torch.equal(patches, row_major(functional.max_pool2d(expected, PATCH)))
    assert 0 < patches.mean() < 1
    assert not cls[:, 13].any()


def test_one_pixel_makes_a_finding_present() -> None:
    rex = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.int16)
    rex[0, PATCH + 1, 3 * PATCH] = 1 << 13
    cls, patches = finding_presence(rex, PATCH)
    assert cls.nonzero().tolist() == [[0, 13]]
    assert patches.nonzero().tolist() == [[0, 5 + 3, 13]]  # second row of five patches, fourth column


def test_fractions_are_average_pooling_of_every_bit() -> None:
    rex = bit_planes(14)
    expected = unpacked(rex, 14)
    cls, patches = finding_fractions(rex, PATCH)
    assert torch.equal(cls, expected.mean((2, 3)).float())
    assert torch.equal(patches, row_major(functional.avg_pool2d(expected.float(), PATCH)))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_presence_does_not_depend_on_the_integer_type(dtype: torch.dtype) -> None:
    rex = bit_planes(14)
    for ours, expected in zip(
        finding_presence(rex.to(dtype), PATCH), finding_presence(rex, PATCH), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_views_are_independent(function: Callable) -> None:
    maps = bit_planes(5)
    for whole, single in zip(function(maps, PATCH), function(maps[1:2], PATCH), strict=True):
        assert torch.equal(whole[1:2], single)


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_soft_labels_on_the_gpu_are_those_on_the_cpu(function: Callable) -> None:
    maps = bit_planes(5)
    for on_gpu, on_cpu in zip(function(maps.cuda(), PATCH), function(maps, PATCH), strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize(("value", "dtype"), [(11, torch.uint8), (-1, torch.int16)])
def test_unknown_classes_are_refused(value: int, dtype: torch.dtype) -> None:
    ts = torch.zeros(1, PATCH, PATCH, dtype=dtype)
    ts[0, 2, 3] = value
    with pytest.raises(ValueError, match=rf"ts must hold classes 0 to 10, got {value}\."):
        coverage_fractions(ts, PATCH, num_classes=11)


@pytest.mark.parametrize("function", [finding_presence, finding_fractions])
@pytest.mark.parametrize("value", [1 << 14, -(1 << 15)])
def test_unknown_findings_are_refused(function: Callable, value: int) -> None:
    rex = torch.zeros(1, PATCH, PATCH, dtype=torch.int16)
    rex[0, 2, 3] = value
    with pytest.raises(ValueError, match=rf"rex must only use bits 0 to 13, got {value}\."):
        function(rex, PATCH)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(PATCH, PATCH), (0, PATCH, PATCH)])
def test_maps_of_another_shape_are_refused(function: Callable, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"(ts|rex) must have shape \(N, S, S\) with pixels, got \("):
        function(torch.zeros(shape, dtype=torch.uint8), PATCH)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_maps_of_real_numbers_are_refused(function: Callable) -> None:
    with pytest.raises(ValueError, match=r"(ts|rex) must be a map of integers, got torch\.float32\."):
        function(torch.zeros(1, PATCH, PATCH), PATCH)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("patch_size_px", [0, 5])
def test_views_that_patches_do_not_tile_are_refused(function: Callable, patch_size_px: int) -> None:
    message = rf"must have sides that are multiples of patch_size_px={patch_size_px}, got 7 x 14\."
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(1, PATCH, 2 * PATCH, dtype=torch.uint8), patch_size_px)
