import hashlib
import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.ct.npz import npz_affine, read_ct, read_grid
from common.ct.rejection import RejectedError


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def stored_hu() -> np.ndarray:
    return np.random.default_rng(0).permutation(7 * 5 * 3).reshape(7, 5, 3).astype(np.int16) - 1000


def test_slices_are_shown_from_the_feet_and_not_turned(tmp_path: Path) -> None:
    """The dataset stores axial slices head first, rows to the back, columns to the left."""
    path = save(tmp_path / "trn00001.npz", ct=stored_hu())
    ct = read_ct(path)
    np.testing.assert_array_equal(ct.hu, stored_hu()[::-1])
    assert ct.hu.dtype == np.int16
    assert ct.values.lowest == -1000
    assert ct.spacing_mm == pytest.approx((0.8, 0.8, 0.8))
    assert ct.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_ct(path, spacing_mm=2.5).spacing_mm == pytest.approx((2.5, 2.5, 2.5))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_the_grid_is_known_from_the_first_bytes(dtype: type, tmp_path: Path) -> None:
    path = save(tmp_path / "trn00001.npz", other=np.zeros(3), ct=stored_hu().astype(dtype))
    grid = read_grid(path, spacing_mm=2)
    assert grid.shape == (7, 5, 3)
    assert "".join(nib.aff2axcodes(grid.affine)) == grid.axcodes == "IPL"
    np.testing.assert_array_equal(np.linalg.norm(grid.affine[:3, :3], axis=0), [2, 2, 2])
    ct = read_ct(path)
    np.testing.assert_array_equal(ct.grid.affine, npz_affine())
    np.testing.assert_array_equal(ct.hu, stored_hu()[::-1])


def test_reading_the_grid_leaves_the_voxels_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "ok.npz", ct=np.random.default_rng(0).integers(0, 999, (40, 30, 20), np.int16))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert read_grid(path).shape == (40, 30, 20)
    with pytest.raises(RejectedError, match=r"unreadable: Cannot read 'ok\.npz' as npz"):
        read_ct(path)


def test_files_that_are_no_volumes_are_rejected(tmp_path: Path) -> None:
    ct = np.zeros((3, 5, 7), np.int16)
    whole = save(tmp_path / "ok.npz", ct=ct).read_bytes()
    save(tmp_path / "key.npz", volume=ct)
    (tmp_path / "half.npz").write_bytes(whole[:-60])
    (tmp_path / "empty.npz").write_bytes(b"")
    with (tmp_path / "npy.npz").open("wb") as file:
        np.save(file, ct)
    (tmp_path / "folder.npz").mkdir()
    for name in ("key", "half", "empty", "npy", "folder", "absent"):
        for read in (read_grid, read_ct):
            with pytest.raises(RejectedError, match=rf"unreadable: Cannot read '{name}\.npz' as npz"):
                read(tmp_path / f"{name}.npz")
    (tmp_path / "page.npz").write_bytes(b"\n<html><body>Too many requests</body></html>")
    with pytest.raises(RejectedError, match=r"Cannot read 'page\.npz' as npz .*Copy or download it again"):
        read_grid(tmp_path / "page.npz")


ARRAYS = {
    "text": (np.array([[["a"]]]), r"unreadable: voxels of 'trn1\.npz' must be numbers, got <U1"),
    "pickled": (
        np.array([{"a": 1}], dtype=object),
        r"unreadable: voxels of 'trn1\.npz' must be numbers, got obj",
    ),
    "two axes": (np.zeros((3, 5), np.int16), r"geometry: volume must have 3 axes, got shape \(3, 5\)"),
    "four axes": (np.zeros((3, 5, 1, 2)), r"geometry: volume must have 3 axes, got shape \(3, 5, 1, 2\)"),
    "nothing": (np.zeros((3, 0, 2), np.int16), r"geometry: volume must have 3 axes, got shape \(3, 0, 2\)"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_no_ct_are_rejected_by_their_header(case: str, tmp_path: Path) -> None:
    array, message = ARRAYS[case]
    path = save(tmp_path / "trn1.npz", ct=array)
    for read in (read_grid, read_ct):
        with pytest.raises(RejectedError, match=message):
            read(path)


def test_an_array_shorter_than_its_header_says_is_rejected_by_it(tmp_path: Path) -> None:
    packed = io.BytesIO()
    np.save(packed, stored_hu())
    with zipfile.ZipFile(tmp_path / "trn1.npz", "w") as archive:
        archive.writestr("ct.npy", packed.getvalue()[:-1])
    with pytest.raises(RejectedError, match=r"unreadable: 'trn1\.npz' must hold 338 bytes of 'ct', got 337"):
        read_grid(tmp_path / "trn1.npz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_rejected(value: float, tmp_path: Path) -> None:
    ct = stored_hu().astype(np.float32)
    ct[2, 1, 1] = value
    with pytest.raises(RejectedError, match="non-finite voxels: voxels must be finite"):
        read_ct(save(tmp_path / "trn1.npz", ct=ct))
