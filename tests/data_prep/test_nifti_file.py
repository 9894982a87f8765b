import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.nifti_file import (
    canonical_hu,
    canonical_shape,
    find_nifti,
    only_file,
    read_header,
    read_stored,
    volume_of,
)
from data_prep.rejection import RejectedError

AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def stored(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, (7, 5, 3)).astype(dtype)


@pytest.fixture
def content(tmp_path: Path, save_nifti: Save) -> bytes:
    """A whole file, not yet gzipped: a header of 352 bytes and 210 of voxels."""
    return gzip.decompress(save_nifti(tmp_path / "ok.nii.gz", stored(), AFFINE).read_bytes())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32])
def test_the_array_is_read_as_it_is_stored(
    suffix: str, dtype: type, tmp_path: Path, save_nifti: Save
) -> None:
    array, header = read_stored(save_nifti(tmp_path / f"a{suffix}", stored(dtype), AFFINE))
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, stored(dtype))
    np.testing.assert_allclose(header.affine, AFFINE, rtol=1e-6)
    assert (header.slope, header.intercept, header.is_blank, header.axcodes) == (1, 0, False, "LPS")
    assert read_header(tmp_path / f"a{suffix}").shape == (7, 5, 3)


def test_the_rescale_of_a_header_is_reported_and_not_applied(tmp_path: Path) -> None:
    # Written into the bytes: nibabel would choose a slope of its own for an image it saves.
    raw = bytearray(nib.Nifti1Image(stored(), AFFINE).to_bytes())
    raw[112:120] = struct.pack("<2f", 2, -1024)
    (tmp_path / "a.nii").write_bytes(raw)
    array, header = read_stored(tmp_path / "a.nii")
    np.testing.assert_array_equal(array, stored())
    assert (header.slope, header.intercept) == (2, -1024)


def test_nifti_2_is_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(stored(), AFFINE), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_stored(tmp_path / "a.nii.gz")[0], stored())


def test_a_header_is_blank_without_a_coordinate_system_or_with_the_identity(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(stored(), np.eye(4)), tmp_path / "identity.nii")
    nib.save(nib.Nifti1Image(stored(), None), tmp_path / "none.nii")
    nib.save(nib.Nifti1Image(stored(), np.diag([-1, -1, 1, 1])), tmp_path / "one_mm.nii")
    blank = {path.stem: read_header(path).is_blank for path in tmp_path.glob("*.nii")}
    assert blank == {"identity": True, "none": True, "one_mm": False}


def test_files_that_are_not_whole_are_rejected(tmp_path: Path, content: bytes) -> None:
    packed = gzip.compress(content)
    damaged = {
        "empty.nii.gz": b"",
        "page.nii.gz": b"<html>404</html>",
        "half.nii.gz": packed[: len(packed) // 2],
        "no_end.nii.gz": packed[:-8],
        "checksum.nii.gz": packed[:-8] + bytes(4) + packed[-4:],
        "short.nii.gz": gzip.compress(content[:-1]),
        "short.nii": content[:-100],
        "header.nii": content[:200],
        "magic.nii": content[:344] + b"xyz\0" + content[348:],
        "type.nii": content[:70] + struct.pack("<h", 9999) + content[72:],
        "huge.nii": content[:42] + struct.pack("<3h", 30000, 30000, 30000) + content[48:],
        "negative.nii": content[:42] + struct.pack("<h", -7) + content[44:],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(
            RejectedError, match=f"unreadable: '{name}' must be a whole NIfTI file, got"
        ) as caught:
            read_stored(tmp_path / name)
        assert caught.value.reason == "unreadable"


def test_what_a_header_alone_shows_is_rejected_at_once(tmp_path: Path) -> None:
    for name, data in (("empty.nii.gz", b""), ("page.nii.gz", b"<html>404</html>")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RejectedError, match=f"unreadable: '{name}' must be a NIfTI file, got"):
            read_header(tmp_path / name)


def test_other_formats_under_a_nifti_name_are_rejected(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(stored(), None), tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    (tmp_path / "a.hdr").rename(tmp_path / "a.nii")
    with pytest.raises(RejectedError, match=r"unreadable: 'a\.nii' must be a NIfTI file"):
        read_header(tmp_path / "a.nii")


def test_colours_are_no_voxels(tmp_path: Path) -> None:
    colours = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(RejectedError, match=r"voxels of 'a\.nii\.gz' must be numbers"):
        read_stored(tmp_path / "a.nii.gz")


def test_hu_are_rescaled_rounded_and_clipped() -> None:
    values = np.array([-3000, -1024, 0, 2047, 2048, 9000], np.int16).reshape(1, 2, 3)
    hu, spacing_mm, lowest = canonical_hu(values, AFFINE, slope=1, intercept=0)
    np.testing.assert_array_equal(hu.transpose(2, 1, 0), values.clip(-1024, 3071))
    assert hu.dtype == np.int16
    assert lowest == -3000
    assert spacing_mm == pytest.approx((0.7, 0.8, 1.5))
    scaled, _, lowest = canonical_hu(values.astype(np.float32), AFFINE, slope=0.5, intercept=-100.4)
    expected = np.rint(values * 0.5 - 100.4).clip(-1024, 3071)
    np.testing.assert_array_equal(scaled.transpose(2, 1, 0), expected)
    assert lowest == pytest.approx(-1600.4)


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


def test_the_shape_of_the_slices_follows_from_the_header(tmp_path: Path, save_nifti: Save) -> None:
    for axcodes in ("LPS", "RAS", "SLP", "IPL"):
        ornt = nib.orientations.axcodes2ornt(axcodes)
        image = nib.Nifti1Image(stored(), AFFINE)
        turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), ornt))
        header = read_header(save_nifti(tmp_path / "a.nii", np.asarray(turned.dataobj), turned.affine))
        assert header.axcodes == axcodes
        assert canonical_shape(header, header.affine) == (3, 5, 7)


def test_geometry_that_axial_slices_refuses_rejects_the_volume(tmp_path: Path, save_nifti: Save) -> None:
    oblique = AFFINE.copy()
    oblique[2, 1] = 0.8
    header = read_header(save_nifti(tmp_path / "a.nii", stored(), oblique))
    with pytest.raises(
        RejectedError, match="geometry: affine must be within 10 degrees of the world axes, got 45"
    ):
        canonical_shape(header, header.affine)
    with pytest.raises(RejectedError, match="geometry: affine must be within 10 degrees"):
        canonical_hu(stored(), header.affine, 1, 0)
    header = read_header(save_nifti(tmp_path / "b.nii", np.zeros((7, 5, 3, 2), np.int16), AFFINE))
    with pytest.raises(RejectedError, match=r"geometry: volume must have 3 axes, got shape \(7, 5, 3, 2\)"):
        canonical_shape(header, header.affine)


def test_files_are_found_in_sub_folders_by_the_name_of_their_volume(tmp_path: Path) -> None:
    for name in ("b/train_2_a_1.nii.gz", "a/c/train_1_a_1.nii", "b/notes.nii.txt", "a/train_2_a_1.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_nifti(tmp_path)
    assert list(found) == ["train_1_a_1", "train_2_a_1"]
    assert [len(files) for files in found.values()] == [1, 2]
    assert only_file(found["train_1_a_1"], "a volume").name == "train_1_a_1.nii"
    with pytest.raises(
        RejectedError, match=r"duplicate: a volume must be one file, got '.*nii' and '.*nii\.gz'"
    ):
        only_file(found["train_2_a_1"], "a volume")


def test_a_volume_is_named_by_a_nifti_file() -> None:
    with pytest.raises(ValueError, match=r"path must end in one of \('\.nii\.gz', '\.nii'\), got 'a\.mha'"):
        volume_of(Path("a.mha"))
