import gzip
import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.ct import nifti_file
from common.ct.nifti_file import find_nifti, only_file, open_nifti, read_header, volume_of
from common.ct.rejection import RejectedError

AFFINE = np.diag([-0.7, -0.8, 1.5, 1.0])
Save = Callable[[Path, np.ndarray, np.ndarray], Path]


def stored(dtype: type | str = np.int16, shape: tuple[int, ...] = (7, 5, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def read(path: Path) -> np.ndarray:
    with open_nifti(path) as file:
        return np.concatenate([planes.copy() for _, planes in file.planes()], axis=-1)


@pytest.fixture
def content(tmp_path: Path, save_nifti: Save) -> bytes:
    """A whole file, not yet gzipped: a header of 352 bytes and 210 of voxels."""
    return gzip.decompress(save_nifti(tmp_path / "ok.nii.gz", stored(), AFFINE).read_bytes())


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.uint8, np.uint16, np.int32, np.float32, ">f8"])
def test_the_array_is_read_as_it_is_stored(
    suffix: str, dtype: type | str, tmp_path: Path, save_nifti: Save
) -> None:
    path = tmp_path / f"a{suffix}"
    image = nib.Nifti1Image(stored(np.dtype(dtype).newbyteorder("=")), AFFINE)
    image.header["vox_offset"] = 352
    header = image.header.as_byteswapped(">" if str(dtype).startswith(">") else "<")
    content = header.binaryblock + bytes(4) + stored(dtype).tobytes(order="F")
    path.write_bytes(content if suffix == ".nii" else gzip.compress(content))
    array, header = read(path), read_header(path)
    assert array.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(array, stored(dtype))
    np.testing.assert_allclose(header.affine, AFFINE, rtol=1e-6)
    assert (header.slope, header.intercept, header.is_blank, header.axcodes) == (1, 0, False, "LPS")
    assert header.shape == (7, 5, 3)


@pytest.mark.parametrize("chunk_bytes", [1, 7 * 5 * 2 * 2, 10**6])
@pytest.mark.parametrize("shape", [(7, 5, 3), (2, 7, 5, 3), (7, 5), (7,), (7, 5, 1)])
def test_planes_come_in_order_whatever_fits_at_once(
    shape: tuple[int, ...],
    chunk_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save_nifti: Save,
) -> None:
    monkeypatch.setattr(nifti_file, "CHUNK_BYTES", chunk_bytes)
    path = save_nifti(tmp_path / "a.nii.gz", stored(shape=shape), AFFINE)
    with open_nifti(path) as file:
        firsts = []
        for first, planes in file.planes():
            firsts.append(first)
            np.testing.assert_array_equal(planes, stored(shape=shape)[..., first : first + planes.shape[-1]])
    plane_bytes = 2 * stored(shape=shape).size // shape[-1]
    assert firsts == list(range(0, shape[-1], max(1, chunk_bytes // plane_bytes)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_checksum_is_that_of_the_whole_file(suffix: str, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    longer = content + bytes(3_000_000)  # behind the voxels
    path.write_bytes(longer if suffix == ".nii" else gzip.compress(longer))
    with open_nifti(path) as file:
        for _ in file.planes():
            pass
        assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_rescale_of_a_header_is_reported_and_not_applied(tmp_path: Path) -> None:
    # Written into the bytes: nibabel would choose a slope of its own for an image it saves.
    raw = bytearray(nib.Nifti1Image(stored(), AFFINE).to_bytes())
    raw[112:120] = struct.pack("<2f", 2, -1024)
    (tmp_path / "a.nii").write_bytes(raw)
    np.testing.assert_array_equal(read(tmp_path / "a.nii"), stored())
    header = read_header(tmp_path / "a.nii")
    assert (header.slope, header.intercept) == (2, -1024)


@pytest.mark.parametrize("endianness", ["<", ">"])
def test_nifti_2_is_read(endianness: str, tmp_path: Path) -> None:
    image = nib.Nifti2Image(stored(), AFFINE)
    image.header["vox_offset"] = 544
    header = image.header.as_byteswapped(endianness)
    voxels = stored().astype(f"{endianness}i2").tobytes(order="F")
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4) + voxels))
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz"), stored())


def test_an_extension_of_the_header_is_skipped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(stored(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 3_000_000))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read(tmp_path / "a.nii.gz"), stored())


def test_a_header_is_blank_without_a_coordinate_system_or_with_the_identity(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(stored(), np.eye(4)), tmp_path / "identity.nii")
    nib.save(nib.Nifti1Image(stored(), None), tmp_path / "none.nii")
    nib.save(nib.Nifti1Image(stored(), np.diag([-1, -1, 1, 1])), tmp_path / "one_mm.nii")
    blank = {path.stem: read_header(path).is_blank for path in tmp_path.glob("*.nii")}
    assert blank == {"identity": True, "none": True, "one_mm": False}


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty.nii.gz": (lambda content: b"", "an end after 0 of 4 bytes"),
    "empty.nii": (lambda content: b"", "an end after 0 of 4 bytes"),
    "page.nii.gz": (lambda content: b"<html>404</html>", r"Not a gzipped file \(b'<h'\)"),
    "page.nii": (lambda content: b"<html>404</html>" * 50, "a file that begins with b'<html>40'"),
    "half.nii.gz": (lambda content: gzip.compress(content)[:150], "Compressed file ended before the end-of-"),
    "no_end.nii.gz": (
        lambda content: gzip.compress(content)[:-8],
        "Compressed file ended before the end-of-",
    ),
    "short.nii.gz": (lambda content: gzip.compress(content[:-1]), "an end after 209 of 210 bytes"),
    "short.nii": (lambda content: content[:-100], r"462 bytes for an array of shape \(7, 5, 3\) of int16"),
    "header.nii": (lambda content: content[:200], "an end after 196 of 344 bytes"),
    "magic.nii": (lambda content: content[:344] + b"xyz\0" + content[348:], "a file that begins with"),
    "pair.nii": (lambda content: content[:344] + b"ni1\0" + content[348:], "a header without voxels behind"),
    "offset.nii": (lambda content: content[:108] + struct.pack("<f", 100) + content[112:], "offset 100"),
    "type.nii": (lambda content: content[:70] + struct.pack("<h", 9999) + content[72:], "9999"),
    "negative.nii": (
        lambda content: content[:42] + struct.pack("<h", -7) + content[44:],
        r"an array of shape \(-7, 5, 3\)",
    ),
    "huge.nii.gz": (
        lambda content: gzip.compress(content[:42] + struct.pack("<3h", 30000, 30000, 30000) + content[48:]),
        r"bytes for an array of shape \(30000, 30000, 30000\) of int16",
    ),
    "rescale.nii": (
        lambda content: content[:112] + struct.pack("<2f", 1, np.inf) + content[120:],
        "Valid slope but invalid intercept inf",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_files_that_are_not_whole_are_rejected(name: str, tmp_path: Path, content: bytes) -> None:
    damage, message = DAMAGE[name]
    (tmp_path / name).write_bytes(damage(content))
    with pytest.raises(
        RejectedError, match=f"unreadable: '{name}' must be a whole NIfTI file, got .*{message}"
    ):
        read(tmp_path / name)


@pytest.mark.parametrize("at", [-8, -6, -4, -1])
def test_a_wrong_checksum_or_length_at_the_end_is_noticed(at: int, tmp_path: Path, save_nifti: Save) -> None:
    """The header is whole, and so are all voxels; only the last bytes of the file tell."""
    path = save_nifti(tmp_path / "a.nii.gz", stored(np.uint8, (128, 128, 128)), AFFINE)
    packed = bytearray(path.read_bytes())
    packed[at] ^= 1
    path.write_bytes(packed)
    assert read_header(path).shape == (128, 128, 128)
    with pytest.raises(RejectedError, match=r"unreadable: 'a\.nii\.gz' must be a whole NIfTI file, got"):
        read(path)


def test_no_damaged_byte_of_a_header_ends_the_run(tmp_path: Path, content: bytes) -> None:
    """Every byte of the header in turn, set to 0, 127 and 255: the file is read or rejected."""
    outcomes = set()
    path = tmp_path / "a.nii"
    for at in range(348):
        for value in (0, 127, 255):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                read(path)
            except RejectedError as error:
                outcomes.add(error.reason)
            else:
                outcomes.add("read")
    assert outcomes == {"read", "unreadable"}


def test_other_formats_under_a_nifti_name_are_rejected(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(stored(), None), tmp_path / "a.img")
    (tmp_path / "a.img").unlink()
    (tmp_path / "a.hdr").rename(tmp_path / "a.nii")
    with pytest.raises(
        RejectedError, match=r"unreadable: 'a\.nii' must be a whole NIfTI file, got a file that"
    ):
        read_header(tmp_path / "a.nii")


def test_colours_are_no_voxels(tmp_path: Path) -> None:
    colours = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colours, AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(
        RejectedError, match=r"unreadable: voxels of 'a\.nii\.gz' must be numbers, got \[\('R'"
    ):
        read_header(tmp_path / "a.nii.gz")


def test_complex_numbers_are_no_voxels(tmp_path: Path, save_nifti: Save) -> None:
    with pytest.raises(
        RejectedError, match=r"unreadable: voxels of 'a\.nii\.gz' must be numbers, got complex64"
    ):
        read_header(save_nifti(tmp_path / "a.nii.gz", stored(np.complex64), AFFINE))


def test_folders_and_links_that_lead_nowhere_are_listed_and_rejected(tmp_path: Path) -> None:
    (tmp_path / "folder.nii.gz" / "deeper").mkdir(parents=True)
    (tmp_path / "folder.nii.gz" / "deeper" / "hidden.nii.gz").touch()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    found = find_nifti(tmp_path)
    assert list(found) == ["folder", "link"]
    with pytest.raises(
        RejectedError, match=r"unreadable: 'link\.nii\.gz' must be a whole NIfTI file, got .*No such file"
    ):
        read_header(only_file(found["link"], "a volume"))
    with pytest.raises(
        RejectedError,
        match=r"unreadable: a volume must be a file that can be read, got the folder '.*",
    ):
        only_file(found["folder"], "a volume")
    with pytest.raises(RejectedError, match=r"unreadable: 'folder\.nii\.gz' must be .*Is a directory"):
        read_header(found["folder"][0])


@contextmanager
def permissions() -> Iterator[None]:
    """Be a user whom permissions bind: root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_files_and_folders_without_permission_are_listed_and_rejected(
    save_nifti: Save, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as place, caplog.at_level(logging.WARNING):
        folder = Path(place)
        save_nifti(folder / "a.nii.gz", stored(), AFFINE).chmod(0)
        save_nifti(folder / "closed" / "b.nii.gz", stored(), AFFINE).parent.chmod(0)
        folder.chmod(0o755)
        with permissions():
            found = find_nifti(folder)
            with pytest.raises(
                RejectedError,
                match=r"unreadable: 'a\.nii\.gz' must be a whole NIfTI file, got .*Permission denied",
            ):
                read_header(folder / "a.nii.gz")
        (folder / "closed").chmod(0o755)
    assert found == {"a": [folder / "a.nii.gz"], "closed": [folder / "closed"]}
    assert "A folder cannot be searched: [Errno 13] Permission denied" in caplog.text


def test_files_are_found_in_sub_folders_by_the_name_of_their_volume(tmp_path: Path) -> None:
    for name in (
        "b/train_2_a_1.nii.gz",
        "a ü/c d/train_1_a_1.nii",
        "b/notes.nii.txt",
        "a ü/train_2_a_1.nii",
        "b/.nii",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_nifti(tmp_path)
    assert list(found) == ["", "train_1_a_1", "train_2_a_1"]
    assert [len(files) for files in found.values()] == [1, 1, 2]
    assert only_file(found["train_1_a_1"], "a volume").name == "train_1_a_1.nii"
    with pytest.raises(
        RejectedError, match=r"duplicate: a volume must be one file, got '.*train_2_a_1.nii' and '.*\.gz'"
    ):
        only_file(found["train_2_a_1"], "a volume")


def test_links_to_folders_are_not_followed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.nii").touch()
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert list(find_nifti(tmp_path)) == ["a"]
    assert "loop' is a link to a folder and is not searched" in caplog.text


def test_a_volume_is_named_by_a_nifti_file() -> None:
    with pytest.raises(ValueError, match=r"path must end in one of \('\.nii\.gz', '\.nii'\), got 'a\.mha'"):
        volume_of(Path("a.mha"))
