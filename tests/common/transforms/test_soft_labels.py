"""Soft labels against one-hot average and max pooling of the masks as they lie under the views."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional

from common.transforms.soft_labels import (
    PatchCells,
    coverage_fractions,
    finding_fractions,
    finding_presence,
    most_cells_per_patch,
    patch_cells,
)

FUNCTIONS = [coverage_fractions, finding_presence, finding_fractions]


class Case(NamedTuple):
    """Views of one size, of slices of different sizes."""

    size_px: int
    patch_size_px: int
    grid: int
    boxes: tuple[tuple[int, int, int, int], ...]
    shapes: tuple[tuple[int, int], ...]
    flips: tuple[bool, ...]


CASES = {
    "paper's local views": Case(
        144, 16, 128, ((0, 3, 200, 307), (1, 101, 0, 154)), ((512, 512), (512, 700)), (False, True)
    ),
    "paper's global views": Case(
        256,
        16,
        128,
        ((0, 0, 0, 512), (2, 61, 140, 307), (1, 7, 9, 900)),
        ((512, 512),) * 2 + ((1024, 1024),),
        (True, False, False),
    ),
    "patches of 14": Case(140, 14, 128, ((1, 33, 2, 222),), ((333, 512),), (True,)),
    "more cells than pixels": Case(
        14, 7, 33, ((2, 0, 4, 35), (0, 1, 1, 5)), ((35, 40), (97, 20)), (False, True)
    ),
    "one pixel": Case(7, 7, 16, ((0, 4, 5, 1),), ((9, 11),), (False,)),
}


def nearest(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Nearest resize in whole numbers: the input pixel under the centre of every output pixel."""
    rows, columns = (
        torch.tensor([((2 * i + 1) * length) // (2 * size) for i in range(size)])
        for length, size in zip(image.shape, (height, width), strict=True)
    )
    return image[rows][:, columns]


def masks_under(planes: torch.Tensor, case: Case) -> torch.Tensor:
    """The plane of each view enlarged to its slice, cropped, resized and mirrored, (N, S, S)."""
    views = []
    for (z, top, left, side), shape, flip in zip(case.boxes, case.shapes, case.flips, strict=True):
        crop = nearest(planes[z], *shape)[top : top + side, left : left + side]
        view = nearest(crop, case.size_px, case.size_px)
        views.append(view.flip(1) if flip else view)
    return torch.stack(views)


def labels_of(function, planes: torch.Tensor, case: Case, num_classes: int, device: str = "cpu") -> list:
    plane = torch.tensor([box[0] for box in case.boxes])
    outputs = function(planes.to(device), plane.to(device), cells_of(case, device), num_classes)
    return [output.cpu() for output in outputs]


def cells_of(case: Case, device: str = "cpu") -> PatchCells:
    most = max(
        most_cells_per_patch(box[3], case.size_px, min(shape), case.patch_size_px, case.grid)
        for box, shape in zip(case.boxes, case.shapes, strict=True)
    )
    tensors = (torch.tensor(part, device=device) for part in (case.boxes, case.flips, case.shapes))
    return patch_cells(
        *tensors, size_px=case.size_px, patch_size_px=case.patch_size_px, grid=case.grid, most_cells=most
    )


def class_planes(num_classes: int, grid: int) -> torch.Tensor:
    """Blocks of one class with some noise; not all classes occur."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, num_classes, (3, 1, 5, 4), generator=generator).float()
    planes = functional.interpolate(coarse, size=(grid, grid))[:, 0].long()
    noise = torch.rand(planes.shape, generator=generator) < 0.1
    noisy = torch.randint(0, num_classes, planes.shape, generator=generator)
    return torch.where(noise, noisy, planes).to(torch.uint8)


def bit_planes(num_classes: int, grid: int) -> torch.Tensor:
    """Each finding in a few cells, overlapping; the last in none, and none in plane 1."""
    generator = torch.Generator().manual_seed(1)
    shown = torch.rand(num_classes, 3, grid, grid, generator=generator) < 0.03
    shown[-1] = False
    shown[0, 0, : grid // 2, : grid // 3] = True
    shown[:, 1] = False
    weights = 2 ** torch.arange(num_classes)
    return (shown.long() * weights[:, None, None, None]).sum(0).to(torch.int16)


def one_hot(ts: torch.Tensor, num_classes: int) -> torch.Tensor:
    return functional.one_hot(ts.long(), num_classes).movedim(-1, 1).float()


def unpacked(rex: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.stack([(rex.int() // 2**k) % 2 for k in range(num_classes)], dim=1).float()


def row_major(pooled: torch.Tensor) -> torch.Tensor:
    return pooled.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", CASES)
def test_coverage_is_exactly_one_hot_average_pooling(name):
    case = CASES[name]
    planes = class_planes(118, case.grid)
    expected = one_hot(masks_under(planes, case), 118)
    cls, patches = labels_of(coverage_fractions, planes, case, 118)
    assert cls.dtype == patches.dtype == torch.float32
    assert torch.equal(cls, expected.double().mean((2, 3)).float())
    assert torch.equal(patches, row_major(functional.avg_pool2d(expected, case.patch_size_px)))


@pytest.mark.parametrize("name", CASES)
def test_findings_are_max_or_average_pooling_of_every_bit(name):
    case = CASES[name]
    planes = bit_planes(14, case.grid)
    bits = unpacked(masks_under(planes, case), 14)
    for function, pool, whole in (
        (finding_presence, functional.max_pool2d, bits.amax((2, 3))),
        (finding_fractions, functional.avg_pool2d, bits.double().mean((2, 3)).float()),
    ):
        cls, patches = labels_of(function, planes, case, 14)
        assert cls.dtype == patches.dtype == torch.float32
        assert torch.equal(cls, whole)
        assert torch.equal(patches, row_major(pool(bits, case.patch_size_px)))


@pytest.mark.parametrize(("side", "size"), [(512, 256), (307, 144), (154, 144)])
def test_the_bound_of_cells_is_reached_or_one_too_many(side, size):
    starts = range(0, 512 - side + 1)
    boxes = tuple((0, start, start, side) for start in starts)
    case = Case(size, 16, 128, boxes, ((512, 512),) * len(boxes), (False,) * len(boxes))
    cells = cells_of(case)
    used = int(cells.row_pixels.ne(0).sum(-1).max())
    assert used <= cells.rows.shape[-1] <= used + 1


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", CASES)
def test_soft_labels_on_the_gpu_are_those_on_the_cpu(name, function):
    case, is_ts = CASES[name], function is coverage_fractions
    planes, number = (class_planes(118, case.grid), 118) if is_ts else (bit_planes(14, case.grid), 14)
    on_gpu, on_cpu = (labels_of(function, planes, case, number, device) for device in ("cuda", "cpu"))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("patch_size_px", [0, 5])
def test_views_that_patches_do_not_tile_are_refused(patch_size_px):
    message = f"size_px must be a multiple of patch_size_px, got 14 and {patch_size_px}"
    case = CASES["more cells than pixels"]
    tensors = (torch.tensor(part) for part in (case.boxes, case.flips, case.shapes))
    with pytest.raises(ValueError, match=message):
        patch_cells(*tensors, size_px=14, patch_size_px=patch_size_px, grid=33, most_cells=3)
