import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.ct.orientation import axial_slices, voxel_axes
from common.labels import load_labels

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
