from itertools import product

import nibabel as nib
import numpy as np
import pytest

from common.ct.geometry import (
    HUValues,
    StoredGrid,
    canonical_hu,
    canonical_indices,
    canonical_shape,
    check_size,
    store_hu,
)
from common.ct.orientation import axial_slices
from common.ct.rejection import RejectedError

AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])


def stored(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (7, 5, 3)).astype(dtype)


def turned(axcodes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same array and affine, stored in another order."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    image = nib.Nifti1Image(stored(), AFFINE).as_reoriented(turn)
    return np.asarray(image.dataobj), image.affine


INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.dtype(">i2"))


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
    around = [0, 1, 2, 3, 100, 24, 1024, 8192, 32767, -1, -1024]
    values = np.array([value for value in (*ends, *around) if ends[0] <= value <= ends[1]]).astype(dtype)
    exact = values.astype(np.float64) * slope + intercept
    out = np.full(len(values), 999, np.int16)
    seen = HUValues()
    assert store_hu(values, slope, intercept, out, seen)
    np.testing.assert_array_equal(out, np.rint(exact).clip(-1024, 3071))
    assert (seen.lowest, seen.highest) == (exact.min(), exact.max())


def test_a_rescale_past_16_bits_is_clipped_and_does_not_wrap() -> None:
    out = np.empty(2, np.int16)
    seen = HUValues()
    assert store_hu(np.array([32767, -32768], np.int16), 10, 0, out, seen)
    assert (seen.lowest, seen.highest) == (-327680, 327670)
    assert out.tolist() == [3071, -1024]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_value_that_is_not_finite_is_told(value: float, dtype: type) -> None:
    assert not store_hu(np.array([1, value, 3], dtype), 1, 0, np.empty(3, np.int16), HUValues())


def test_a_sample_of_the_values_is_kept_as_they_were_before_the_clip() -> None:
    values = np.arange(200 * 130 * 3).reshape(200, 130, 3) - 40_000
    seen = HUValues()
    store_hu(values, 1, 0, np.empty(values.shape, np.int16), seen)
    store_hu(values[:5, :7, :1] * 2.5, 1, 0, np.empty((5, 7, 1), np.int16), seen)
    np.testing.assert_array_equal(
        seen.sample, np.concatenate([values[::3, ::2].ravel(), 2.5 * values[:5, :7, 0].ravel()])
    )


def test_hu_are_rescaled_rounded_and_clipped() -> None:
    values = np.array([-3000, -1024, 0, 2047, 2048, 9000], np.int16).reshape(1, 2, 3)
    hu, spacing_mm, seen = canonical_hu(values, AFFINE, slope=1, intercept=0)
    np.testing.assert_array_equal(hu.transpose(2, 1, 0), values.clip(-1024, 3071))
    assert hu.dtype == np.int16
    assert seen.lowest == -3000
    assert spacing_mm == pytest.approx((0.7, 0.8, 1.5))
    scaled, _, seen = canonical_hu(values.astype(np.float32), AFFINE, slope=0.5, intercept=-100.4)
    expected = np.rint(values * 0.5 - 100.4).clip(-1024, 3071)
    np.testing.assert_array_equal(scaled.transpose(2, 1, 0), expected)
    assert seen.lowest == pytest.approx(-1600.4)


def test_whole_hu_survive_float_storage_exactly() -> None:
    values = np.arange(-1024, 3072).reshape(16, 16, 16)
    from_int, _, _ = canonical_hu(values.astype(np.int16), AFFINE, 1, 0)
    from_float, _, _ = canonical_hu(values.astype(np.float32), AFFINE, 1, 0)
    raw, _, _ = canonical_hu((values + 8192).astype(np.uint16), AFFINE, 1, -8192)
    np.testing.assert_array_equal(from_float, from_int)
    np.testing.assert_array_equal(raw, from_int)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_rejected(value: float) -> None:
    values = stored(np.float32)
    values[2, 3, 1] = value
    with pytest.raises(
        RejectedError, match="non-finite voxels: voxels must be finite, got NaN or infinity in slice 1"
    ):
        canonical_hu(values, AFFINE, 1, 0)


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAI", "SLP", "IPL", "AIR"])
def test_canonical_indices_lead_to_the_voxels_of_axial_slices(axcodes: str) -> None:
    array, affine = turned(axcodes)
    grid = StoredGrid(array.shape, affine, axcodes)
    slices, _ = axial_slices(array, affine)
    assert canonical_shape(grid) == slices.shape == (3, 5, 7)
    matrix = canonical_indices(grid)
    for place in product(range(3), range(5), range(7)):
        x, y, z, _ = (matrix @ [*place, 1]).astype(int)
        assert array[x, y, z] == slices[place]


def test_canonical_indices_of_an_axis_of_one_voxel() -> None:
    grid = StoredGrid((1, 4, 3), np.diag([0.7, -0.7, 2, 1]), "RPS")
    assert (canonical_indices(grid) @ [2, 1, 0, 1]).tolist() == [0, 1, 2, 1]
    assert np.linalg.det(canonical_indices(grid)) != 0


def oblique(deg: float) -> np.ndarray:
    """Turned as a whole around x: axes stay perpendicular."""
    cos, sin = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]]) @ AFFINE


def tilted(deg: float) -> np.ndarray:
    """Slices shifted along y from one to the next, as by a tilted gantry."""
    affine = AFFINE.copy()
    affine[1, 2] = affine[2, 2] * np.tan(np.radians(deg))
    return affine


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (
            oblique(11),
            r"affine must be within 10 degrees of the world axes, got 11\.0\. Resample the volume to ax",
        ),
        (tilted(20), r"affine must be within 10 degrees of the world axes, got 20\.0\. Resample"),
        (
            tilted(5),
            r"axes must be perpendicular, got 5\.0 degrees off, as of a tilted gantry\. Resample the vo",
        ),
        (tilted(-1), r"axes must be perpendicular, got 1\.0 degrees off"),
    ],
)
def test_grids_that_are_no_axial_scans_are_rejected(affine: np.ndarray, message: str) -> None:
    with pytest.raises(RejectedError, match=f"geometry: {message}"):
        canonical_shape(StoredGrid((7, 5, 3), affine, ""))


@pytest.mark.parametrize("affine", [oblique(9), tilted(0.3)])
def test_small_angles_are_accepted(affine: np.ndarray) -> None:
    assert canonical_shape(StoredGrid((7, 5, 3), affine, "")) == (3, 5, 7)


def test_one_slice_is_no_volume() -> None:
    assert canonical_shape(StoredGrid((7, 5, 2), AFFINE, "LPS")) == (2, 5, 7)
    with pytest.raises(
        RejectedError, match="geometry: volume must have at least 2 slices, got 1. Join slices"
    ):
        canonical_shape(StoredGrid((7, 5, 1), AFFINE, "LPS"))


@pytest.mark.parametrize(
    ("spacing_mm", "shown"),
    [
        ((0.7, 0.7, 0.035), r"\(0\.7, 0\.7, 0\.035\)"),
        ((np.nan, 0.7, 1), r"\(nan, 0\.7, 1\)"),
        ((1, 1, 30), "30"),
    ],
)
def test_spacings_no_ct_has_are_rejected_whatever_the_format(spacing_mm: tuple, shown: str) -> None:
    grid = StoredGrid((5, 4, 3), np.diag([*spacing_mm, 1.0]), "RAS")
    with pytest.raises(RejectedError, match=rf"spacing: spacing must lie in 0\.1\.\.20\.0 mm, got .*{shown}"):
        canonical_shape(grid)


def test_no_ct_is_longer_than_a_body() -> None:
    canonical_shape(StoredGrid((512, 512, 500), np.diag([-0.7, -0.7, 5, 1]), "LPS"))
    for shape, spacing_mm in (((512, 512, 501), (-0.7, -0.7, 5)), ((512, 512, 300), (-7, -7, 1))):
        with pytest.raises(RejectedError, match=r"must be at most 2500 mm long, got (2505|3584) mm: shape"):
            canonical_shape(StoredGrid(shape, np.diag([*spacing_mm, 1.0]), "LPS"))


def test_no_ct_has_more_than_two_thousand_slices_of_a_thousand_squared() -> None:
    check_size((2048, 1024, 1024))
    for shape in ((2049, 1024, 1024), (2**21, 2**21, 2**22)):  # the second has 2**64, which wraps in NumPy
        with pytest.raises(
            RejectedError, match=r"size: a CT must have at most 2,147,483,648 voxels, got shape"
        ):
            check_size(shape)
    with pytest.raises(RejectedError, match=r"size: .* got shape \(5000, 5000, 90\)"):
        canonical_shape(StoredGrid((5000, 5000, 90), AFFINE, "LPS"))
