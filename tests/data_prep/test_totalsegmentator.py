from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from common.transforms.orientation import axial_slices
from data_prep.rejection import RejectedError
from data_prep.totalsegmentator import nearest, read_label_map

SHAPE_XYZ = (19, 17, 5)
SPACING_MM = (0.7, 0.8, 1.5)
AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 118, SHAPE_XYZ).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    return read_label_map(path, SHAPE_XYZ[::-1], SPACING_MM)


@pytest.mark.parametrize("shape", [(512, 512), (128, 128), (17, 19), (131, 1024), (1, 127)])
def test_cells_take_the_voxel_at_their_centre(shape: tuple[int, int]) -> None:
    planes = np.random.default_rng(0).integers(0, 118, (2, *shape)).astype(np.uint8)
    oracle = interpolate(torch.from_numpy(planes)[None].float(), size=(128, 128), mode="nearest-exact")[0]
    np.testing.assert_array_equal(nearest(planes), oracle.numpy())


@pytest.mark.parametrize("axcodes", ["LPS", "LAS", "RAS", "SPL"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_a_map_is_turned_by_its_own_affine(
    axcodes: str, dtype: type, tmp_path: Path, save_nifti: Save
) -> None:
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(axcodes))
    image = nib.Nifti1Image(ids().astype(dtype), AFFINE).as_reoriented(turn)
    planes = read(save_nifti(tmp_path / "a.nii.gz", np.asarray(image.dataobj), image.affine))
    assert planes.dtype == np.uint8
    np.testing.assert_array_equal(planes, nearest(ids().transpose(2, 1, 0)))


def test_a_rescale_in_the_header_is_honoured(tmp_path: Path) -> None:
    image = nib.Nifti1Image((ids() // 2).astype(np.uint8), AFFINE)
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([2, 0], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(read(tmp_path / "a.nii"), nearest((ids() // 2 * 2).transpose(2, 1, 0)))


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (
            np.full(SHAPE_XYZ, 118, np.uint8),
            AFFINE,
            r"ids of 'a\.nii\.gz' must lie in 0\.\.117, got 118 to 118",
        ),
        (np.full(SHAPE_XYZ, -1, np.int16), AFFINE, r"must lie in 0\.\.117, got -1 to -1"),
        (np.full(SHAPE_XYZ, np.nan, np.float32), AFFINE, r"must lie in 0\.\.117, got nan to nan"),
        (
            np.full(SHAPE_XYZ, 1.5, np.float32),
            AFFINE,
            r"ids of 'a\.nii\.gz' must be whole numbers, got fractions",
        ),
        (ids()[:-1], AFFINE, r"must have the CT's shape \(5, 17, 19\), got \(5, 17, 18\)"),
        (ids(), AFFINE @ np.diag([1, 1, 1.1, 1]), r"must have the CT's spacing \(0\.7, 0\.8, 1\.5\) mm, got"),
        (ids(), np.eye(4), r"'a\.nii\.gz' must state its orientation, got a blank header"),
    ],
)
def test_maps_that_do_not_fit_their_ct_are_rejected(
    array: np.ndarray, affine: np.ndarray, message: str, tmp_path: Path, save_nifti: Save
) -> None:
    with pytest.raises(RejectedError, match=f"mask: .*{message}") as caught:
        read(save_nifti(tmp_path / "a.nii.gz", array, affine))
    assert caught.value.reason == "mask"


@pytest.mark.real_ct
def test_real_organs_meet_their_ct_on_the_small_grid(real_ct_dir: Path) -> None:
    """A CT stored as LPS and its map stored as LAS, both reduced to 128 x 128."""
    ct = nib.load(real_ct_dir / "totalseg_dicom_ct_native.nii.gz")
    hu, spacing_mm = axial_slices(np.asarray(ct.dataobj), ct.affine)
    planes = read_label_map(real_ct_dir / "totalseg_dicom_seg117_native.nii.gz", hu.shape, spacing_mm)
    small = nearest(hu)
    spleen, liver, muscle = (small[planes == index] for index in (1, 5, 86))
    for organ, low, high in ((spleen, 20, 150), (liver, 20, 150), (muscle, -120, 120)):
        assert len(organ) > 500
        assert low < np.percentile(organ, 5) < np.percentile(organ, 95) < high
