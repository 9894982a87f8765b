from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from common.ct.volume_file import open_volume, read_header


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("is_upper", [False, True])
def test_every_format_gives_the_same_voxels_and_header(suffix: str, is_upper: bool, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 100, (7, 5, 3)).astype(np.int16)
    affine = np.diag([-0.7, -0.8, 1.5, 1])
    affine[:3, 3] = 10, 20, 30
    nib.save(nib.Nifti1Image(stored, affine), tmp_path / "source.nii")
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "source.nii")), str(path))
    if is_upper:
        path = path.rename(tmp_path / f"a{suffix.upper()}")
    header = read_header(path)
    assert header.shape == (7, 5, 3)
    np.testing.assert_allclose(header.affine, affine, rtol=1e-6)
    assert (header.slope, header.intercept, header.is_blank, header.contradiction) == (1, 0, False, "")
    with open_volume(path) as file:
        array = np.concatenate([planes.copy() for _, planes in file.planes()], axis=-1)
    np.testing.assert_array_equal(array, stored)
