from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from common.transforms.axial_slices import AxialSlicesd

SHAPE_XYZ = (3, 5, 7)
SPACING_MM = (0.7, 0.8, 1.5)


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


def load(path: Path, **options: str) -> dict:
    chain = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), AxialSlicesd("image", **options)])
    sample = chain({"image": str(path)})
    assert isinstance(sample, dict)
    return sample


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "LAS", "SPL"])
def test_ct_files_of_any_orientation_load_alike(axcodes: str, tmp_path: Path) -> None:
    volume, affine = lps_scan()
    volume = volume * 50 - 2000
    nib.save(nib.Nifti1Image(*stored_as(axcodes, volume, affine)), tmp_path / "ct.nii.gz")
    sample = load(tmp_path / "ct.nii.gz")
    expected = volume.transpose(2, 1, 0)[:, None].clip(-1024, 3071).astype(np.float32)
    assert type(sample["image"]) is torch.Tensor
    assert sample["image"].dtype == torch.float32
    np.testing.assert_array_equal(sample["image"].numpy(), expected)
    assert sample["spacing_mm"] == pytest.approx(SPACING_MM)


def test_xy_slices_are_transposed(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(*lps_scan()), tmp_path / "ct.nii.gz")
    radiological = load(tmp_path / "ct.nii.gz", slice_axes="yx")
    transposed = load(tmp_path / "ct.nii.gz", slice_axes="xy")
    assert tuple(transposed["image"].shape) == (7, 1, 3, 5)
    np.testing.assert_array_equal(transposed["image"], radiological["image"].transpose(2, 3))
    assert transposed["spacing_mm"] == radiological["spacing_mm"]


def meta(image: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(
        torch.from_numpy(image.copy()), affine=torch.from_numpy(affine), meta={"filename_or_obj": "a.nii"}
    )


def test_a_key_that_is_missing_is_passed_over_if_allowed() -> None:
    volume, affine = lps_scan()
    sample = AxialSlicesd(["image", "mask"], allow_missing_keys=True)({"image": meta(volume[None], affine)})
    assert set(sample) == {"image", "spacing_mm"}


def test_inputs_that_are_no_ct_are_refused() -> None:
    volume, affine = lps_scan()
    with pytest.raises(ValueError, match=r"slice_axes must be one of \('yx', 'xy'\), got 'zy'"):
        AxialSlicesd("image", slice_axes="zy")
    with pytest.raises(ValueError, match="'image' must be a meta tensor with an affine, got Tensor. Load it"):
        AxialSlicesd("image")({"image": torch.zeros(1, 2, 3, 5)})
    with pytest.raises(
        ValueError, match=r"'image' must have shape \(1, X, Y, Z\), got \(2, 3, 5, 7\) for a\.nii"
    ):
        AxialSlicesd("image")({"image": meta(np.stack([volume, volume]), affine)})
    with pytest.raises(ValueError, match=r"'image' must have finite voxels, got NaN or infinity for a\.nii"):
        AxialSlicesd("image")({"image": meta(np.where(volume == 0, np.inf, volume)[None], affine)})
    wider = affine @ np.diag([1, 1, 2, 1])
    with pytest.raises(ValueError, match="keys must agree in spacing_mm, got"):
        AxialSlicesd(["image", "mask"])(
            {"image": meta(volume[None], affine), "mask": meta(volume[None], wider)}
        )


@pytest.mark.real_ct
def test_lungs_of_a_whole_chest_are_above_the_abdomen(real_ct_dir: Path) -> None:
    sample = load(real_ct_dir / "lidc_idri_0314_ct_1p56x1p56x2mm.nii.gz")
    hu = sample["image"]
    assert tuple(hu.shape) == (138, 1, 256, 256)
    middle = hu[:, :, 64:192, 64:192]
    air = (middle < -700).float().mean(dim=(1, 2, 3))
    assert air[70:110].mean() > 3 * air[:10].mean()
    # The table the patient lies on is behind, that is below, the patient.
    body = (hu[69, 0] > -500).float().sum(dim=1)
    assert body.nonzero().max() > 128
    assert sample["spacing_mm"] == pytest.approx((1.5625, 1.5625, 2.0))
