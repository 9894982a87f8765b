"""MetaImage and NRRD: the voxels, and the place in the world, that SimpleITK finds; or refused."""

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from common.ct.files import open_volume
from common.ct.nifti import VolumeHeader
from common.ct.rejection import RejectedError

SHAPE_ZYX = (3, 5, 7)
SPACING_MM = (0.7, 0.8, 1.5)
LPS = np.diag([-0.7, -0.8, 1.5, 1.0])


def voxels(dtype: type | str = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, SHAPE_ZYX).astype(dtype)


def image_of(array: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((*SPACING_MM, 1)[: image.GetDimension()])
    return image


def read_header(path: Path) -> VolumeHeader:
    with open_volume(path) as file:
        return file.header


def read(path: Path) -> np.ndarray:
    with open_volume(path) as file:
        return np.concatenate([planes.copy() for _, planes in file.planes()], axis=-1)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr", ".MHA"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_the_array_is_read_as_it_is_stored(suffix: str, dtype: type, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix.lower()}"
    sitk.WriteImage(image_of(voxels(dtype)), str(path))
    path = path.rename(tmp_path / f"a{suffix}")
    array = read(path)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, voxels(dtype).T)
    header = read_header(path)
    assert (header.shape, header.slope, header.intercept, header.is_blank) == ((7, 5, 3), 1, 0, False)
    np.testing.assert_allclose(header.affine, LPS)


@pytest.mark.parametrize("suffix", ["mhd", "nhdr"])
def test_the_checksum_is_that_of_header_and_voxels(suffix: str, tmp_path: Path) -> None:
    sitk.WriteImage(image_of(voxels()), str(tmp_path / f"a.{suffix}"))
    with open_volume(tmp_path / f"a.{suffix}") as file:
        first = file.sha256()
    (data,) = (path for path in tmp_path.iterdir() if path.suffix != f".{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes() + data.read_bytes()
    assert first == hashlib.sha256(whole).hexdigest()


def nrrd(path: Path, *lines: str, data: bytes | None = None, **fields: str) -> Path:
    stated = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "7 5 3",
        "space directions": "(0.7,0,0) (0,0.8,0) (0,0,1.5)",
        "endian": "little",
        "encoding": "raw",
        "space origin": "(10,20,30)",
    }
    stated |= {name.replace("_", " "): value for name, value in fields.items()}
    text = ["NRRD0004", *(f"{name}: {value}" for name, value in stated.items() if value), *lines]
    path.write_bytes("\n".join(text).encode() + b"\n\n" + (voxels("<i2").tobytes() if data is None else data))
    return path


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("RAS", (1, 1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
    ],
)
def test_worlds_of_nrrd_are_turned_into_one(space: str, signs: tuple[int, ...], tmp_path: Path) -> None:
    """By the format's definition: the space says where its axes point."""
    header = read_header(nrrd(tmp_path / "a.nrrd", space=space))
    np.testing.assert_allclose(header.affine[:3, :3], np.diag(SPACING_MM) * np.array(signs)[:, None])
    np.testing.assert_allclose(header.affine[:3, 3], np.array([10, 20, 30]) * signs)
    assert not header.is_blank


@pytest.mark.parametrize(
    "fields",
    [
        {"space": "scanner-xyz"},
        {"space": "", "space_directions": "", "space_origin": "", "spacings": "0.7 0.8 1.5"},
        {"space_directions": "(1,0,0) (0,1,0) (0,0,1)", "space_origin": "(0,0,0)"},
    ],
)
def test_a_nrrd_that_does_not_say_where_left_is_is_blank(fields: dict[str, str], tmp_path: Path) -> None:
    assert read_header(nrrd(tmp_path / "a.nrrd", **fields)).is_blank


def mha(path: Path, data: bytes | None = None, **fields: str) -> Path:
    stated = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "0 0 0",
        "ElementSpacing": "0.7 0.8 1.5",
        "DimSize": "7 5 3",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
    }
    stated |= fields
    stated["ElementDataFile"] = stated.pop("ElementDataFile")  # ends the header
    text = [f"{name} = {value}" for name, value in stated.items() if value]
    path.write_bytes("\n".join(text).encode() + b"\n" + (voxels("<i2").tobytes() if data is None else data))
    return path


def test_a_metaimage_without_orientation_is_blank(tmp_path: Path) -> None:
    assert not read_header(mha(tmp_path / "a.mha")).is_blank
    assert read_header(mha(tmp_path / "b.mha", TransformMatrix="")).is_blank
    assert read_header(mha(tmp_path / "c.mha", ElementSpacing="1 1 1")).is_blank


def test_a_large_byte_order_is_read(tmp_path: Path) -> None:
    path = mha(tmp_path / "a.mha", voxels(">i2").tobytes(), BinaryDataByteOrderMSB="True")
    np.testing.assert_array_equal(read(path), voxels().T)


def test_trailing_axes_of_one_are_dropped(tmp_path: Path) -> None:
    fields = {"NDims": "4", "DimSize": "7 5 3 1", "ElementSpacing": "0.7 0.8 1.5 1", "Offset": "0 0 0 0"}
    path = mha(tmp_path / "a.mha", **fields, TransformMatrix="1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1")
    assert read_header(path).shape == (7, 5, 3)
    np.testing.assert_array_equal(read(path), voxels().T)
    np.testing.assert_allclose(read_header(path).affine, LPS)


COLORS = {"ElementNumberOfChannels": "3", "ElementType": "MET_UCHAR"}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "page.mha": (lambda path: path.write_bytes(b"<html>404</html>") and path, "Cannot read 'page.mha'"),
    "empty.nrrd": (lambda path: path.touch() or path, "Cannot read 'empty.nrrd'"),
    "short.mha": (lambda path: mha(path, b"0" * 100), "Cannot read 'short.mha'"),
    "short.nrrd": (lambda path: nrrd(path, data=b"0" * 100), "Cannot read 'short.nrrd'"),
    "half.nrrd": (
        lambda path: nrrd(path, encoding="gzip", data=gzip.compress(voxels("<i2").tobytes())[:60]),
        "Cannot read 'half.nrrd'",
    ),
    "huge.mha": (lambda path: mha(path, DimSize="30000 30000 30000"), "at most 2,147,483,648 voxels"),
    "flat.nrrd": (lambda path: nrrd(path, sizes="7 0 3"), "Cannot read 'flat.nrrd'"),
    "negative.mha": (lambda path: mha(path, NDims="-5"), "NDims must be from 1 to 9, got '-5'"),
    "many.mha": (lambda path: mha(path, NDims="300"), "NDims must be from 1 to 9, got '300'"),
    "late.mha": (lambda path: mha(path, ObjectType="Image\n\n NDims = 0"), "NDims .* got '0'"),
    "large.mha": (lambda path: mha(path, DimSize="1000 1000 1000"), "bytes for an array of shape"),
    "colors.mha": (lambda path: mha(path, voxels("u1").repeat(3).tobytes(), **COLORS), "colors or vectors"),
    "up.mhd": (lambda path: mha(path, ElementDataFile="../up.raw"), r"beside it, got '\.\./up\.raw'"),
    "abs.nhdr": (lambda path: nrrd(path, "data file: /etc/passwd", data=b""), "beside it, got '/etc/passwd'"),
    "list.mhd": (lambda path: mha(path, ElementDataFile="LIST"), "beside it, got 'LIST'"),
    "lost.mhd": (lambda path: mha(path, ElementDataFile="lost.raw"), "beside it, got 'lost.raw'"),
    "gone.mha": (lambda path: path, "Cannot read 'gone.mha': .*No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_volumes_are_refused_in_a_line(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    (tmp_path / "up.raw").write_bytes(voxels("<i2").tobytes())
    (tmp_path / "in").mkdir()
    with pytest.raises(RejectedError, match=message) as caught:
        read(make(tmp_path / "in" / name))
    assert "\n" not in caught.value.detail
