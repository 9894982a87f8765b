import itertools
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.cohort.cohort import load_labels
from common.ct.geometry import (
    EXCLUDED,
    HUValues,
    RejectedError,
    StoredGrid,
    axial_slices,
    canonical_hu,
    canonical_indices,
    canonical_shape,
    check_size,
    is_failure,
    store_hu,
    voxel_axes,
)

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


SHAPE_XYZ = (3, 5, 7)
SPACING_MM = (0.7, 0.8, 1.5)
AXCODES = [
    "".join(codes)
    for axes in itertools.permutations(("RL", "AP", "IS"))
    for codes in itertools.product(*axes)
]


def lps_scan() -> tuple[np.ndarray, np.ndarray]:
    """A scan stored as LPS, every voxel another HU, and its affine."""
    volume = np.random.default_rng(0).permutation(np.prod(SHAPE_XYZ)).reshape(SHAPE_XYZ).astype(np.int16)
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0])
    affine[:3, 3] = (11, 13, -17)
    return volume, affine


def stored_as(axcodes: str, volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in the same places of the world, in another order: nibabel's own reorientation."""
    image = nib.Nifti1Image(volume, affine)
    target = nib.orientations.axcodes2ornt(axcodes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))
    assert "".join(nib.aff2axcodes(image.affine)) == axcodes
    return np.asarray(image.dataobj), image.affine


def test_lps_storage_is_transposed_and_nothing_else() -> None:
    volume, affine = lps_scan()
    slices, spacing_mm = axial_slices(volume, affine)
    for x, y, z in itertools.product(*map(range, SHAPE_XYZ)):
        assert slices[z, y, x] == volume[x, y, z]
    assert spacing_mm == pytest.approx(SPACING_MM)


def test_all_48_storage_orders_are_there() -> None:
    assert len(set(AXCODES)) == 48
    assert {"RAS", "LPS", "LAS", "SPL", "IPL"} <= set(AXCODES)


@pytest.mark.parametrize("axcodes", AXCODES)
def test_every_storage_order_gives_the_same_slices(axcodes: str) -> None:
    volume, affine = lps_scan()
    slices, spacing_mm = axial_slices(*stored_as(axcodes, volume, affine))
    np.testing.assert_array_equal(slices, volume.transpose(2, 1, 0))
    assert spacing_mm == pytest.approx(SPACING_MM)


def test_indices_grow_to_the_left_the_back_and_the_head() -> None:
    """World coordinates of every voxel, sent through as the volume, decide without a word about axes."""
    volume, affine = lps_scan()
    stored, stored_affine = stored_as("SAR", volume, affine)
    grid = np.stack(np.meshgrid(*map(np.arange, stored.shape), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(stored_affine, grid)
    x, y, z = (axial_slices(world[..., axis], stored_affine)[0] for axis in range(3))
    np.testing.assert_allclose(np.diff(x, axis=2), -SPACING_MM[0])
    np.testing.assert_allclose(np.diff(y, axis=1), -SPACING_MM[1])
    np.testing.assert_allclose(np.diff(z, axis=0), SPACING_MM[2])


def test_slices_are_a_view_of_the_volume() -> None:
    volume, affine = lps_scan()
    assert np.shares_memory(axial_slices(volume, affine)[0], volume)
    assert np.shares_memory(axial_slices(volume, np.eye(4))[0], volume)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, bool])
def test_type_of_the_voxels_is_kept(dtype: type) -> None:
    volume, affine = lps_scan()
    assert axial_slices(volume.astype(dtype), affine)[0].dtype == dtype


def rotated(degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ lps_scan()[1]


def test_a_slight_gantry_tilt_is_kept_and_a_strong_one_refused() -> None:
    volume, _ = lps_scan()
    slices, spacing_mm = axial_slices(volume, rotated(9.9))
    np.testing.assert_array_equal(slices, volume.transpose(2, 1, 0))
    assert spacing_mm == pytest.approx(SPACING_MM)
    with pytest.raises(ValueError, match=r"affine must be within 10 degrees of the world axes, got 10\.1"):
        axial_slices(volume, rotated(10.1))
    with pytest.raises(ValueError, match=r"within 10 degrees of the world axes, got 45\.0"):
        axial_slices(volume, rotated(45))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_of_no_length_is_refused(axis: int) -> None:
    affine = lps_scan()[1]
    affine[:3, axis] = 0
    with pytest.raises(ValueError, match="affine must have three perpendicular axes"):
        axial_slices(lps_scan()[0], affine)


def test_two_axes_along_one_world_axis_are_refused() -> None:
    affine = np.array([[1.0, 0.98, 0, 0], [0, 0.17, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match="affine must have three perpendicular axes"):
        voxel_axes(affine)


def test_a_damaged_affine_is_refused() -> None:
    affine = lps_scan()[1]
    affine[1, 1] = np.nan
    with pytest.raises(ValueError, match="affine must be a finite 4 x 4 matrix, got .*nan"):
        axial_slices(lps_scan()[0], affine)
    with pytest.raises(ValueError, match="affine must be a finite 4 x 4 matrix"):
        axial_slices(lps_scan()[0], np.eye(3))


def test_a_volume_without_three_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"volume must have 3 axes, got shape \(2, 3, 5, 1\)"):
        axial_slices(np.zeros((2, 3, 5, 1)), np.eye(4))


def organs(folder: Path, name: str, mask_name: str) -> tuple[np.ndarray, np.ndarray]:
    ct, mask = (nib.load(folder / f"totalseg_{file}.nii.gz") for file in (name, mask_name))
    hu, ct_spacing_mm = axial_slices(np.asarray(ct.dataobj), ct.affine)
    ids, mask_spacing_mm = axial_slices(np.asarray(mask.dataobj), mask.affine)
    assert hu.shape == ids.shape
    assert ct_spacing_mm == pytest.approx(mask_spacing_mm)
    return hu, ids


@pytest.mark.real_ct
def test_organs_of_a_mask_stored_the_other_way_round_meet_the_ct(real_ct_dir: Path) -> None:
    """The CT is stored as LPS, its mask as LAS: read alike, the spine would lie in front of the belly."""
    files = [nib.load(real_ct_dir / f"totalseg_dicom_{name}_native.nii.gz") for name in ("ct", "seg117")]
    assert ["".join(nib.aff2axcodes(file.affine)) for file in files] == ["LPS", "LAS"]
    hu, ids = organs(real_ct_dir, "dicom_ct_native", "dicom_seg117_native")
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


@pytest.mark.real_ct
def test_organs_of_a_ras_scan_meet_the_ct_and_follow_the_body(real_ct_dir: Path) -> None:
    hu, ids = organs(real_ct_dir, "example_ct_3mm", "example_seg117_3mm")
    organ = {label.name: ids == label.index for label in load_labels("totalsegmentator")}
    assert np.median(hu[organ["lung_lower_lobe_right"]]) < -700
    assert 0 < np.median(hu[organ["liver"]]) < 100
    feet_to_head = ["urinary_bladder", "vertebrae_L5", "kidney_right", "liver", "lung_lower_lobe_right"]
    heights = [np.argwhere(organ[name])[:, 0].mean() for name in feet_to_head]
    assert heights == sorted(heights)
    assert np.argwhere(organ["kidney_right"])[:, 2].mean() < np.argwhere(organ["kidney_left"])[:, 2].mean()


def test_a_rejection_is_one_line_about_one_volume() -> None:
    error = RejectedError("unreadable", "Expected 9 bytes, got 7\n - could the file be damaged?")
    assert str(error).startswith("unreadable: Expected 9")
    assert "\n" not in str(error)
    record = error.of("train_1_a_1")
    assert record.volume == "train_1_a_1"
    assert record.reason == "unreadable"
    assert record.detail == "Expected 9 bytes, got 7  - could the file be damaged?"


def test_scans_of_other_body_parts_are_no_failures() -> None:
    assert not is_failure(RejectedError(EXCLUDED, "listed").of("a"))
    assert is_failure(RejectedError("mask", "other shape").of("a"))
