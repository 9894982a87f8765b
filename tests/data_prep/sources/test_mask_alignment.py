from itertools import product

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from common.ct.geometry import Grid, axial_slices
from common.ct.rejection import RejectedError
from data_prep.sources.mask_alignment import align, cell_voxels

SHAPE_XYZ = (19, 17, 5)
AFFINE = np.array([[-0.7, 0, 0, 40], [0, -0.8, 0, 30], [0, 0, 1.5, -100], [0, 0, 0, 1]])
CT = Grid(SHAPE_XYZ, AFFINE)


def stored_as(axcodes: str, shape: tuple[int, ...] = SHAPE_XYZ) -> tuple[np.ndarray, np.ndarray]:
    """A volume in which each voxel has a value of its own, and its affine, stored in another order."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    image = nib.Nifti1Image(array, AFFINE).as_reoriented(turn)
    return np.asarray(image.dataobj), image.affine


def moved(x: float = 0, y: float = 0, z: float = 0) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += (x, y, z)
    return affine


@pytest.mark.parametrize("ct_axcodes", ["LPS", "RAI", "SLP"])
@pytest.mark.parametrize("mask_axcodes", ["LPS", "LAS", "IRP", "PSL"])
def test_voxels_of_one_grid_meet_in_any_two_orders(ct_axcodes, mask_axcodes) -> None:
    ct, ct_affine = stored_as(ct_axcodes)
    mask, mask_affine = stored_as(mask_axcodes)
    alignment = align("a", mask.shape, mask_affine, Grid(ct.shape, ct_affine))
    slices, _ = axial_slices(ct, ct_affine)
    assert alignment.is_same_grid
    assert alignment.ct_shape == slices.shape == (5, 17, 19)
    for place in product(range(5), range(17), range(19)):
        i, j, k = np.rint(alignment.to_mask @ [*place, 1])[:3].astype(int)
        assert mask[i, j, k] == slices[place]
        along = [alignment.index_along(canonical)[place[canonical]] for canonical in range(3)]
        assert tuple(along) == tuple((i, j, k)[axis] for axis in alignment.axis_of)


@pytest.mark.parametrize("has_origin", [True, False])
def test_headers_may_round(has_origin) -> None:
    """Off by less than half a voxel at the far end: the nearest voxels are the same."""
    ct = Grid((512, 512, 300), np.diag([-0.703125, -0.703125, 1.25, 1]), has_origin)
    mask_affine = np.diag([-0.7034, -0.7028, 1.2508, 1])
    mask_affine[:3, 3] = 0.1
    assert align("a", ct.shape, mask_affine, ct).is_same_grid


def test_without_an_origin_only_shape_spacing_and_order_count() -> None:
    ct = CT._replace(has_origin=False)
    assert align("a", SHAPE_XYZ, moved(z=5000), ct).is_same_grid
    with pytest.raises(
        RejectedError, match=r"mask: 'a' must have the CT's spacing \(0\.7, 0\.8, 1\.5\) mm, got"
    ):
        align("a", SHAPE_XYZ, AFFINE @ np.diag([1, 1, 1.1, 1]), ct)
    with pytest.raises(
        RejectedError, match=r"mask: 'a' must have the CT's shape \(5, 17, 19\), got \(6, 17, 19\)"
    ):
        align("a", (19, 17, 6), AFFINE, ct)


@pytest.mark.parametrize("axcodes", ["LPS", "RAI", "PSL"])
@pytest.mark.parametrize("shape", [(18, 17, 5), (19, 17, 7), (20, 16, 5)])
def test_the_grid_of_the_ct_with_another_number_of_voxels_is_rejected(axcodes, shape) -> None:
    """One end lies on the CT's, so that the other is missing or too much."""
    mask, affine = stored_as(axcodes, shape)
    with pytest.raises(
        RejectedError,
        match=rf"'a' must have the CT's shape \(5, 17, 19\), got \({shape[2]}, {shape[1]}, {shape[0]}\)",
    ):
        align("a", mask.shape, affine, CT)


@pytest.mark.parametrize(
    "affine",
    [
        moved(z=1000),
        moved(x=3),
        moved(y=-3),
        moved(z=3.1),
        AFFINE @ np.diag([0.8, 1, 1, 1]),
        np.diag([-0.7, -0.8, 1.5, 1]),
    ],
    ids=["far", "x", "y", "z", "smaller", "no origin"],
)
def test_a_mask_that_misses_a_part_of_the_ct_is_rejected(affine) -> None:
    extent = r"x 27\.1\.\.40\.4, y 16\.8\.\.30\.4, z -100\.8\.\.-93\.2 mm"
    with pytest.raises(RejectedError, match=rf"'a' must cover the CT, {extent}, got x ") as caught:
        align("a", SHAPE_XYZ, affine, CT)
    assert caught.value.reason == "mask"


@pytest.mark.parametrize("spacing_mm", [1.5, 3.0])
@pytest.mark.parametrize("rounded", [np.floor, np.rint, np.ceil])
def test_masks_resampled_to_a_rounded_number_of_voxels_cover_their_ct(rounded, spacing_mm) -> None:
    """The first voxels of both have one corner, or, unless the number is rounded down, one centre."""
    for size in range(250, 260):
        ct = Grid((size, size, size), np.diag([-0.7, -0.8, 1.25, 1]))
        shape = tuple(int(rounded(size * mm / spacing_mm)) for mm in (0.7, 0.8, 1.25))
        affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1])
        if rounded is not np.floor:
            assert not align("a", shape, affine, ct).is_same_grid
        affine[:3, 3] = (np.diag(affine) - np.diag(ct.affine))[:3] / 2
        assert not align("a", shape, affine, ct).is_same_grid


def turned(deg: float, margin: int) -> tuple[tuple[int, ...], np.ndarray]:
    """A grid around the CT, turned around its middle."""
    cos, sin = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    shape = tuple(size + 2 * margin for size in SHAPE_XYZ)
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    middle = AFFINE[:3, :3] @ (np.array(SHAPE_XYZ) - 1) / 2 + AFFINE[:3, 3]
    affine[:3, 3] = middle - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return shape, affine


def test_the_nearest_voxels_of_a_turned_grid() -> None:
    shape, affine = turned(8, margin=3)
    alignment = align("a", shape, affine, CT)
    assert not alignment.is_same_grid
    centres = (
        np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    )
    for z in (0, 4):
        i, j, k = alignment.nearest(z)
        for row, column in ((0, 0), (0, 127), (64, 31), (127, 127)):
            x, y = cell_voxels(19)[column], cell_voxels(17)[row]
            world = AFFINE[:3, :3] @ (x, y, z) + AFFINE[:3, 3]
            chosen = centres[i[row, column], j[row, column], k[row, column]]
            # The nearest along the mask's axes is the nearest of all, since they are perpendicular.
            assert np.linalg.norm(chosen - world) == pytest.approx(
                np.linalg.norm(centres - world, axis=-1).min()
            )


def test_a_turned_grid_without_a_margin_misses_corners() -> None:
    shape, affine = turned(30, margin=0)
    with pytest.raises(RejectedError, match="mask: 'a' must cover the CT"):
        align("a", shape, affine, CT)


@pytest.mark.parametrize("affine", [np.full((4, 4), np.nan), np.diag([0.7, 0.8, 0, 1])])
def test_an_affine_that_leads_nowhere_is_rejected(affine) -> None:
    with pytest.raises(RejectedError, match=r"mask: 'a' must state its orientation, got the affine \[\["):
        align("a", SHAPE_XYZ, affine, CT)


@pytest.mark.parametrize("size", [1, 17, 127, 128, 131, 512, 1024])
def test_cells_take_the_pixel_at_their_centre(size) -> None:
    line = torch.arange(size, dtype=torch.float64)[None, None]
    oracle = interpolate(line, size=128, mode="nearest-exact")[0, 0].numpy()
    np.testing.assert_array_equal(cell_voxels(size), oracle)
