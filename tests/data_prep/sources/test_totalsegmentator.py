import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to

from common.ct import nifti
from common.ct.files import ct_file, read_ct
from common.ct.geometry import Grid, axial_slices
from common.ct.rejection import RejectedError
from data_prep.sources.totalsegmentator import read_label_map
from tests.data_prep.conftest import cells_of

SHAPE_XYZ = (19, 17, 5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
CT = Grid(SHAPE_XYZ, AFFINE, "LPS")


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 118, SHAPE_XYZ).astype(np.uint8)


@pytest.mark.parametrize("axcodes", ["LPS", "LAS", "RAS", "SPL", "PIR"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
def test_a_map_is_turned_by_its_own_affine(
    axcodes, dtype, chunk_bytes, tmp_path, save_nifti, monkeypatch
) -> None:
    monkeypatch.setattr(nifti, "CHUNK_BYTES", chunk_bytes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    image = nib.Nifti1Image(ids().astype(dtype), AFFINE).as_reoriented(turn)
    path = save_nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine)
    planes = read_label_map(path, CT)
    assert planes.dtype == np.uint8
    np.testing.assert_array_equal(planes, cells_of(ids().transpose(2, 1, 0)))


def test_a_rescale_in_the_header_is_honoured(tmp_path) -> None:
    image = nib.Nifti1Image((ids() // 2).astype(np.uint8), AFFINE)
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([2, 0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(
        read_label_map(tmp_path / "a.nii", CT), cells_of((ids() // 2 * 2).transpose(2, 1, 0))
    )


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.full(SHAPE_XYZ, 118, np.uint8), AFFINE, r"ids of 'a\.nii\.gz' .*0\.\.117, got 118 to 118"),
        (np.full(SHAPE_XYZ, -1, np.int16), AFFINE, r"0\.\.117, got -1 to -1"),
        (np.full(SHAPE_XYZ, np.nan, np.float32), AFFINE, r"'a\.nii\.gz' must be whole numbers"),
        (np.full(SHAPE_XYZ, 1.5, np.float32), AFFINE, r"'a\.nii\.gz' must be whole numbers, got fractions"),
        (ids()[:-1], AFFINE, r"\(5, 17, 19\), got \(5, 17, 18\)"),
        (np.stack(2 * [ids()], -1), AFFINE, r"must have 3 axes, got shape \(19, 17, 5, 2\)"),
        (
            ids(),
            AFFINE @ np.diag([1.4, 1.25, 1.2, 1]),
            r"\(5, 17, 19\), but .*\(0\.7, 0\.8, 1\.5\) mm in the CT, \(0\.98, 1, 1\.8\) mm",
        ),
        (ids(), AFFINE - np.diag([0, 0, 0.9, 0]) + np.eye(4, k=3) * 1e-9, "must cover|lies on other voxels"),
        (ids(), np.eye(4), "got a blank header"),
    ],
)
def test_maps_that_do_not_fit_their_ct_are_rejected(array, affine, message, tmp_path, save_nifti) -> None:
    with pytest.raises(RejectedError, match=f"mask: .*{message}") as caught:
        read_label_map(save_nifti(tmp_path / "a.nii.gz", array, affine), CT)
    assert caught.value.reason == "mask"


def turned(affine: np.ndarray, deg: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(deg)), np.sin(np.radians(deg))
    return np.array([[cos, -sin, 0, 0], [sin, cos, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine


@pytest.mark.parametrize(
    ("shape", "affine"),
    [
        ((11, 9, 4), np.diag([-1.3, -1.7, 2.1, 1])),
        ((40, 36, 11), np.diag([-0.35, -0.4, 0.75, 1])),
        ((30, 30, 9), np.array([[0.7, 0, 0, -15.3], [0, -0.8, 0, 3.3], [0, 0, 1.5, -2.6], [0, 0, 0, 1]])),
        ((9, 30, 30), np.array([[0, 0, 0.7, -15.3], [0, -0.8, 0, 3.3], [1.5, 0, 0, -2.6], [0, 0, 0, 1]])),
        ((30, 30, 9), turned(np.array([[-0.7, 0, 0, 4], [0, -0.8, 0, 4], [0, 0, 1.5, -3], [0, 0, 0, 1]]), 7)),
    ],
    ids=["coarser", "finer", "shifted", "shifted and another order", "turned"],
)
def test_a_map_on_another_grid_is_resampled_to_the_nearest_voxel(shape, affine, tmp_path, save_nifti) -> None:
    """Nibabel resamples the map to the whole grid of the CT; the cells take from there."""
    array = np.random.default_rng(1).integers(0, 118, shape).astype(np.uint8)
    path = save_nifti(tmp_path / "a.nii.gz", array, affine)
    on_ct = resample_from_to(nib.Nifti1Image(array, affine), (SHAPE_XYZ, AFFINE), order=0, mode="nearest")
    expected = cells_of(np.asarray(on_ct.dataobj).transpose(2, 1, 0))
    assert len(np.unique(expected)) > 50
    np.testing.assert_array_equal(read_label_map(path, CT), expected)


@pytest.mark.parametrize("axcodes", ["LPS", "LAS"])
def test_a_raw_volume_takes_a_map_with_an_origin(axcodes, tmp_path, save_nifti) -> None:
    """CT-RATE's label maps have the header of its v2 volumes, its v1 volumes have none."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    image = nib.Nifti1Image(ids(), AFFINE + np.eye(4, k=3) * 500).as_reoriented(turn)
    path = save_nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine)
    planes = read_label_map(path, CT._replace(has_origin=False))
    np.testing.assert_array_equal(planes, cells_of(ids().transpose(2, 1, 0)))


@pytest.mark.real_ct
def test_real_organs_meet_their_ct_on_the_small_grid(real_ct_dir) -> None:
    """A CT stored as LPS and its map stored as LAS, both reduced to 128 x 128."""
    ct = read_ct(ct_file(real_ct_dir / "totalseg_dicom_ct_native.nii.gz"))
    path = real_ct_dir / "totalseg_dicom_seg117_native.nii.gz"
    planes, small = read_label_map(path, ct.grid), cells_of(ct.hu)
    spleen, liver, muscle = (small[planes == index] for index in (1, 5, 86))
    for organ, low, high in ((spleen, 20, 150), (liver, 20, 150), (muscle, -120, 120)):
        assert len(organ) > 500
        assert low < np.percentile(organ, 5) < np.percentile(organ, 95) < high
    image = nib.load(path)
    on_ct = resample_from_to(
        image, (ct.grid.shape, nib.load(real_ct_dir / "totalseg_dicom_ct_native.nii.gz").affine), order=0
    )
    slices, _ = axial_slices(np.asarray(on_ct.dataobj).astype(np.uint8), on_ct.affine)
    np.testing.assert_array_equal(planes, cells_of(slices))
