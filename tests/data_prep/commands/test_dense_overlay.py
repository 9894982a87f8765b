from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep.__main__ import app

pytestmark = pytest.mark.usefixtures("any_values")


def test_a_picture_of_ct_and_labels_is_drawn(tmp_path: Path) -> None:
    hu = np.full((60, 50, 7), -1000, np.int16)
    hu[9:50, 4:45] = 30
    ids = np.zeros(hu.shape, np.uint8)
    ids[15:30, 10:25, 2:5] = 5
    for name, array in (("ct", hu), ("map", ids)):
        nib.save(nib.Nifti1Image(array, np.diag([0.7, 0.7, 2, 1])), tmp_path / f"{name}.nii.gz")
    arguments = [tmp_path / "ct.nii.gz", tmp_path / "map.nii.gz", "--out", tmp_path / "a.png"]
    sizes = ["--grid", 4, "--size-px", 64, "--slices", 3]
    answer = CliRunner().invoke(app, ["dense-overlay", *map(str, (*arguments, *sizes))])
    assert answer.exit_code == 0, answer.output
    picture = Image.open(tmp_path / "a.png")
    assert picture.width > picture.height > 500
    red, green, blue = np.asarray(picture.convert("RGB"), int).transpose(2, 0, 1)
    assert ((red > green + 60) & (red > blue + 60)).sum() > 500
