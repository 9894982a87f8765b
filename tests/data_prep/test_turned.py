from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.ct.geometry import axial_slices
from common.ct.npz import read_ct
from common.ct.rejection import RejectedError
from data_prep.turned import TURNS, find_volumes, turned_slices, write_turned

pytestmark = pytest.mark.usefixtures("any_values")


def stored_npz(path: Path) -> np.ndarray:
    """RAD-ChestCT's order: (inferior, posterior, left)."""
    stored = np.random.default_rng(0).permutation(4 * 5 * 3).reshape(4, 5, 3).astype(np.int16) - 1000
    np.savez_compressed(path, ct=stored)
    return stored


def seen(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """What an encoder is shown of a file."""
    image = nib.load(path)
    return axial_slices(np.asarray(image.dataobj), image.affine)


@pytest.mark.parametrize("turn", TURNS)
def test_an_encoder_is_shown_the_turned_slices(turn, tmp_path) -> None:
    stored = stored_npz(tmp_path / "tst00001.npz")
    write_turned(tmp_path / "tst00001.npz", turn, tmp_path / "new" / "tst00001.nii.gz", spacing_mm=2.0)
    hu, spacing_mm = seen(tmp_path / "new" / "tst00001.nii.gz")
    feet, back, left = 3, 2, 1  # of the stored array, counted from its first voxel: head, front, right
    value = stored[feet, back, left]
    place = tuple(int(index) for index in np.argwhere(hu == value)[0])
    expected = {
        "right": (0, back, left),
        "transposed": (0, left, back),
        "flipped": (0, back, 2 - left),
        "sagittal": (left, back, feet),
    }
    assert place == expected[turn]
    assert spacing_mm == pytest.approx((2.0, 2.0, 2.0))


def test_sagittal_is_what_comes_of_taking_the_stored_axes_for_x_y_z(tmp_path) -> None:
    stored = stored_npz(tmp_path / "tst00001.npz")
    taken_for_lps, _ = axial_slices(stored, np.diag([-0.8, -0.8, 0.8, 1.0]))
    hu, _ = turned_slices(read_ct(tmp_path / "tst00001.npz").hu, (0.8, 0.8, 0.8), "sagittal")
    np.testing.assert_array_equal(hu, taken_for_lps)


def test_spacing_turns_with_the_axes(tmp_path) -> None:
    hu = np.random.default_rng(1).integers(-1000, 500, (4, 5, 3)).astype(np.int16)
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-0.7, -0.8, 2.5, 1.0]))
    nib.save(image, tmp_path / "valid_1_a_1.nii.gz")
    spacings = {}
    for turn in TURNS:
        write_turned(tmp_path / "valid_1_a_1.nii.gz", turn, tmp_path / f"{turn}.nii.gz")
        spacings[turn] = seen(tmp_path / f"{turn}.nii.gz")[1]
    np.testing.assert_array_equal(seen(tmp_path / "right.nii.gz")[0], hu)
    assert spacings["transposed"] == pytest.approx((0.8, 0.7, 2.5))
    assert spacings["sagittal"] == pytest.approx((2.5, 0.8, 0.7))
    assert spacings["flipped"] == spacings["right"] == pytest.approx((0.7, 0.8, 2.5))


def test_volumes_are_found_by_prefix_and_once(tmp_path) -> None:
    for name in ("a/tst00002.npz", "tst00001.nii.gz", "trn00001.npz", "tst_notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(find_volumes(tmp_path, "tst")) == ["tst00001", "tst00002"]
    with pytest.raises(FileNotFoundError, match=r"No volumes val\*"):
        find_volumes(tmp_path, "val")
    (tmp_path / "tst00002.nii").touch()
    with pytest.raises(ValueError, match="2 volumes have one name, such as .*tst00002"):
        find_volumes(tmp_path, "tst")


def test_what_is_no_turn_or_no_ct_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"turn must be one of \('right', .*\), got 'upside_down'"):
        turned_slices(np.zeros((2, 3, 4)), (1.0, 1.0, 1.0), "upside_down")
    (tmp_path / "tst00001.npz").write_text("<html>")
    with pytest.raises(RejectedError, match="not a zip file"):
        write_turned(tmp_path / "tst00001.npz", "right", tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()
