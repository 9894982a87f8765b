"""Stored arrays become HU the right way up, however they are stored; what is no axial CT is refused."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.cohort.cohort import load_labels
from common.ct.geometry import (
    Grid,
    HUValues,
    axial_slices,
    canonical_axes,
    canonical_indices,
    canonical_shape,
    check_size,
    store_hu,
)
from common.ct.rejection import RejectedError

SHAPE_XYZ = (7, 5, 3)
SPACING_MM = (0.7, 0.8, 1.5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.dtype(">i2"))


def kept_of(values: np.ndarray, slope: float = 1, intercept: float = 0) -> tuple[np.ndarray, HUValues]:
    """What becomes of values: HU, and what is kept of them before the clip."""
    out, kept = np.full(values.shape, 999, np.int16), HUValues()
    store_hu(values, slope, intercept, out=out, kept=kept, where="slice 3")
    return out, kept


@pytest.mark.parametrize("dtype", [*INTEGERS, np.float32, np.float64, np.dtype(">f4")], ids=str)
@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(1, 0), (1, -1024), (1, -8192), (10, 0), (0.5, -100.25), (-3, 7), (1, 2.5), (2**40, 0)],
)
def test_hu_are_those_of_float64_rounded_and_clipped(
    dtype: type | np.dtype, slope: float, intercept: float
) -> None:
    """Whole numbers are computed in whole numbers; nothing wraps, whatever the type holds."""
    kind = np.dtype(dtype).kind
    ends = [np.iinfo(dtype).min, np.iinfo(dtype).max] if kind in "iu" else [-1e9, 1e9]
    around = [*range(-1030, -1019), *range(3066, 3076), 0, 1, 2, 3, 24, 100, 8192, 32767, -1]
    values = np.array([value for value in (*ends, *around) if ends[0] <= value <= ends[1]]).astype(dtype)
    exact = values.astype(np.float64) * slope + intercept
    hu, kept = kept_of(values, slope, intercept)
    np.testing.assert_array_equal(hu, np.rint(exact).clip(-1024, 3071))
    assert (kept.lowest, kept.highest) == (exact.min(), exact.max())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_that_is_not_finite_is_refused(value: float, dtype: type) -> None:
    with pytest.raises(RejectedError, match="non-finite voxels: .* in slice 3"):
        kept_of(np.array([1, value, 3], dtype))


def test_a_sample_of_the_values_is_kept_as_they_were_before_the_clip() -> None:
    values = np.arange(200 * 130 * 3).reshape(200, 130, 3) - 40_000
    kept = HUValues()
    for part in (values, values[:5, :7, :1] * 2.5):
        store_hu(part, 1, 0, out=np.empty(part.shape, np.int16), kept=kept, where="")
    expected = np.concatenate([values[::3, ::2].ravel(), 2.5 * values[:5, :7, 0].ravel()])
    np.testing.assert_array_equal(kept.sample, expected)


def scan() -> np.ndarray:
    """Voxels that all differ, stored as LPS."""
    voxels = np.random.default_rng(0).permutation(np.prod(SHAPE_XYZ))
    return voxels.reshape(SHAPE_XYZ).astype(np.int16)


def stored_as(codes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in the same places of the world, in another order: nibabel's own reorientation."""
    affine = AFFINE.copy()
    affine[:3, 3] = (11, 13, -17)
    target = nib.orientations.axcodes2ornt(codes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), target)
    image = nib.Nifti1Image(scan(), affine).as_reoriented(turn)
    assert nib.aff2axcodes(image.affine) == tuple(codes)
    return np.asarray(image.dataobj), image.affine


ORDERS = [
    "".join(codes)
    for axes in itertools.permutations(("RL", "AP", "IS"))
    for codes in itertools.product(*axes)
]


@pytest.mark.parametrize("codes", ORDERS)
def test_every_storage_order_gives_the_same_slices(codes: str) -> None:
    stored, affine = stored_as(codes)
    slices, spacing_mm = axial_slices(stored, affine)
    np.testing.assert_array_equal(slices, scan().transpose(2, 1, 0))
    assert spacing_mm == pytest.approx(SPACING_MM)
    assert np.shares_memory(slices, stored)
    grid = Grid(stored.shape, affine)
    assert (grid.axcodes, canonical_shape(grid)) == (codes, (3, 5, 7))
    matrix = canonical_indices(grid)
    for place in itertools.product(range(3), range(5), range(7)):
        x, y, z, _ = (matrix @ [*place, 1]).astype(int)
        assert stored[x, y, z] == slices[place]


def test_indices_grow_to_the_left_the_back_and_the_head() -> None:
    """World coordinates of every voxel, sent through as the volume, decide without a word about axes."""
    stored, affine = stored_as("SAR")
    grid = np.stack(np.meshgrid(*map(np.arange, stored.shape), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(affine, grid)
    x, y, z = (axial_slices(world[..., axis], affine)[0] for axis in range(3))
    np.testing.assert_allclose(np.diff(x, axis=2), -SPACING_MM[0])
    np.testing.assert_allclose(np.diff(y, axis=1), -SPACING_MM[1])
    np.testing.assert_allclose(np.diff(z, axis=0), SPACING_MM[2])


def test_canonical_indices_of_an_axis_of_one_voxel() -> None:
    matrix = canonical_indices(Grid((1, 4, 3), np.diag([0.7, -0.7, 2, 1])))
    assert (matrix @ [2, 1, 0, 1]).tolist() == [0, 1, 2, 1]
    assert np.linalg.det(matrix) != 0


def oblique(deg: float) -> np.ndarray:
    """Turned as a whole around x: axes stay perpendicular."""
    cos, sin = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]]) @ AFFINE


def tilted(deg: float) -> np.ndarray:
    """Slices shifted along y from one to the next, as by a tilted gantry."""
    affine = AFFINE.copy()
    affine[1, 2] = affine[2, 2] * np.tan(np.radians(deg))
    return affine


NOT_FINITE = AFFINE.copy()
NOT_FINITE[1, 1] = np.nan


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (oblique(10.1), r"within 10 degrees of the world axes, got 10\.1\. Resample"),
        (oblique(45), r"within 10 degrees of the world axes, got 45\.0"),
        (tilted(20), r"within 10 degrees of the world axes, got 20\.0"),
        (tilted(5), r"perpendicular, got 5\.0 degrees off.* Resample"),
        (tilted(-1), r"perpendicular, got 1\.0 degrees off"),
        (AFFINE @ np.diag([0, 1, 1, 1]), "three perpendicular axes"),
        (AFFINE @ np.diag([1, 1, 0, 1]), "three perpendicular axes"),
        (np.array([[1.0, 0.98, 0, 0], [0, 0.17, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "three perpendicular"),
        (NOT_FINITE, "finite 4 x 4 matrix, got .*nan"),
        (np.eye(3), "finite 4 x 4 matrix"),
    ],
)
def test_affines_of_no_axial_scan_are_refused(affine: np.ndarray, message: str) -> None:
    for read in (canonical_axes, lambda affine: axial_slices(scan(), affine)):
        with pytest.raises(RejectedError, match=f"geometry: .*{message}"):
            read(affine)


@pytest.mark.parametrize("affine", [oblique(9.9), tilted(0.3)])
def test_small_angles_are_accepted(affine: np.ndarray) -> None:
    slices, spacing_mm = axial_slices(scan(), affine)
    np.testing.assert_array_equal(slices, scan().transpose(2, 1, 0))
    assert spacing_mm == pytest.approx(SPACING_MM, rel=1e-4)
    assert canonical_shape(Grid(SHAPE_XYZ, affine)) == (3, 5, 7)


def test_a_volume_without_three_axes_is_refused() -> None:
    with pytest.raises(RejectedError, match=r"3 axes, got shape \(2, 3, 5, 1\)"):
        axial_slices(np.zeros((2, 3, 5, 1)), np.eye(4))


def grid_of(shape: tuple[int, int, int], *spacing_mm: float) -> Grid:
    return Grid(shape, np.diag([*spacing_mm, 1.0]))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (grid_of((7, 5, 1), -0.7, -0.8, 1.5), "geometry: .* at least 2 slices, got 1. Join slices"),
        (grid_of((5, 4, 3), 0.7, 0.7, 0.035), r"spacing: .* 0\.1\.\.20\.0 mm, got \(0\.7, 0\.7, 0\.035\)"),
        (grid_of((5, 4, 3), np.nan, 0.7, 1), r"spacing: .* got \(nan, 0\.7, 1\)"),
        (grid_of((5, 4, 3), 1, 1, 30), "spacing: .*30"),
        (grid_of((512, 512, 501), -0.7, -0.7, 5), "spacing: .* 2500 mm long, got 2505 mm: shape"),
        (grid_of((512, 512, 300), -7, -7, 1), "spacing: .* 2500 mm long, got 3584 mm: shape"),
        (grid_of((5000, 5000, 90), -0.7, -0.8, 1.5), r"size: .* got shape \(5000, 5000, 90\)"),
    ],
)
def test_grids_that_no_ct_has_are_refused(grid: Grid, message: str) -> None:
    with pytest.raises(RejectedError, match=message):
        canonical_shape(grid)


def test_the_largest_grids_are_accepted() -> None:
    assert canonical_shape(grid_of((512, 512, 500), -0.7, -0.7, 5)) == (500, 512, 512)
    assert canonical_shape(grid_of((7, 5, 2), -0.7, -0.8, 1.5)) == (2, 5, 7)
    check_size((2048, 1024, 1024))
    for shape in ((2049, 1024, 1024), (2**21, 2**21, 2**22)):  # the second has 2**64, which wraps in NumPy
        with pytest.raises(RejectedError, match="size: .* 2,147,483,648 voxels"):
            check_size(shape)


@pytest.mark.real_ct
def test_organs_of_a_mask_stored_the_other_way_round_meet_the_ct(real_ct_dir: Path) -> None:
    """The CT is stored as LPS, its mask as LAS: read alike, the spine would lie in front of the belly."""
    files = [nib.load(real_ct_dir / f"totalseg_dicom_{name}_native.nii.gz") for name in ("ct", "seg117")]
    assert ["".join(nib.aff2axcodes(file.affine)) for file in files] == ["LPS", "LAS"]
    (hu, spacing_mm), (ids, ids_spacing_mm) = (
        axial_slices(np.asarray(file.dataobj), file.affine) for file in files
    )
    assert (hu.shape, spacing_mm) == (ids.shape, pytest.approx(ids_spacing_mm))
    organ = {label.name: ids == label.index for label in load_labels("totalsegmentator")}
    for name, low, high in (("liver", 20, 150), ("spleen", 20, 150), ("autochthon_left", -120, 120)):
        inside = hu[organ[name]]
        assert low <= np.percentile(inside, 5) <= np.percentile(inside, 95) <= high
    assert np.median(hu[organ["vertebrae_T12"]]) > 150
    columns = {name: np.argwhere(organ[name])[:, 2].mean() for name in ("liver", "spleen")}
    assert (
        columns["liver"] < hu.shape[2] / 2 < columns["spleen"]
    )  # the patient's right is on the left of the slice
    rows = {name: np.argwhere(organ[name])[:, 1].mean() for name in ("liver", "vertebrae_T12")}
    assert rows["liver"] < rows["vertebrae_T12"]
