"""Files of strangers: read like any other, or refused in one line that says what to mend, without a trace."""

import errno
import gzip
import os
import pickle
import re
import string
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    RLELossless,
)

from common.ct import files as ct_files
from common.ct.dicom_files import series_volume
from common.ct.files import (
    VOLUME_NAME,
    VOLUME_SUFFIXES,
    find_named,
    only_file,
    unique_names,
    volume_files,
    volume_name,
    walk,
)
from common.ct.rejection import RejectedError, RejectedVolume
from common.embeddings.work import ct_sources
from tests import fuzz
from tests.conftest import touch

LPS = np.diag([-0.7, -0.8, 1.5, 1.0])
Save = Callable[[Path, np.ndarray, np.ndarray], Path]
Write = Callable[..., list[Path]]


def hu(slices: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (slices, 17, 19)).astype(np.int16)


@pytest.fixture(autouse=True)
def nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Whatever a test does, the folder for temporary files is empty after it."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []


def zip_of(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    return archive


def zip_with(archive: Path, *members: tuple[str, bytes]) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return archive


@pytest.mark.parametrize("suffix", [".zip", ".ZIP"])
def test_a_zipped_series_is_the_series(suffix: str, tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "study" / "series", hu())
    (tmp_path / "study" / "LICENSE").write_text("CC BY")
    archive = zip_of(tmp_path / "study", tmp_path / f"scan{suffix}")
    ((plain,), _), ((zipped,), rejected) = ct_sources(tmp_path / "study"), ct_sources(archive)
    assert rejected == []
    assert zipped.volume == plain.volume == "1_2_840_99_7"
    for ct in (zipped.read(), zipped.read()):
        np.testing.assert_array_equal(ct.hu[:, 1:18], hu())
        assert ct.spacing_mm == plain.read().spacing_mm


def test_zips_lie_among_other_volumes_and_hold_any_format(
    tmp_path: Path, write_series: Write, save_nifti: Save
) -> None:
    root = tmp_path / "ct"
    for series in ("1.2.3", "1.2.4"):
        write_series(tmp_path / "study" / series, hu(), series=series)
    save_nifti(root / "plain.nii.gz", hu().T, LPS)
    save_nifti(tmp_path / "others" / "a" / "inside.nii.gz", hu().T, LPS)
    np.savez_compressed(tmp_path / "others" / "trn1.npz", ct=hu()[::-1])
    zip_of(tmp_path / "study", root / "study.zip")
    zip_of(tmp_path / "others", root / "deep.zip")
    zip_with(root / "tables.zip", ("metadata.csv", b"a,b"))  # like any other file that is no CT
    sources, rejected = ct_sources(root)
    assert rejected == []
    assert [source.volume for source in sources] == ["1_2_3", "1_2_4", "inside", "plain", "trn1"]
    for source in sources:
        np.testing.assert_array_equal(source.read().hu[:, 1:18], hu())


def test_a_series_inside_and_outside_of_a_zip_is_given_twice(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "ct" / "series", hu())
    zip_of(tmp_path / "ct" / "series", tmp_path / "ct" / "scan.zip")
    sources, (rejected,) = ct_sources(tmp_path / "ct")
    assert sources == []
    assert (rejected.volume, rejected.reason) == ("1_2_840_99_7", "duplicate")


def test_a_zipped_series_without_a_name_is_called_the_same_every_time(
    tmp_path: Path, write_series: Write
) -> None:
    write_series(tmp_path / "study", hu(), series="")
    archive = zip_of(tmp_path / "study", tmp_path / "scan.zip")
    (first,), (second,) = ct_sources(archive)[0], ct_sources(archive)[0]
    assert first.volume == second.volume
    assert first.volume.startswith("series_")
    first.read()


def test_messages_name_files_by_their_place_in_the_zip(tmp_path: Path, write_series: Write) -> None:
    write_series(tmp_path / "study" / "gap", hu())[2].unlink()
    write_series(tmp_path / "study" / "scout", hu(), series="1.2.3", orientation=(1, 0, 0, 0, 0, -1))
    (tmp_path / "study" / "broken.dcm").write_text("none")
    archive = zip_of(tmp_path / "study", tmp_path / "scan.zip")
    (source,), rejected = ct_sources(archive)
    inside = f"{archive}/study"
    assert {item.volume: item.detail.split(" as ")[0] for item in rejected}[
        "broken.dcm"
    ] == f"Cannot read '{inside}/broken.dcm'"
    assert (
        f"'{inside}/scout': 5 of CT of another plane"
        in {item.volume: item for item in rejected}["1_2_3"].detail
    )
    with pytest.raises(RejectedError, match=rf"got 3 mm from '{inside}/gap/IM\d+' to '{inside}/gap/IM"):
        source.read()


def test_a_volume_travels_to_another_process(tmp_path: Path, write_series: Write, save_nifti: Save) -> None:
    """Found in a folder, in a zip, and as a series of a zip; read where it arrives, in another folder."""
    save_nifti(tmp_path / "in" / "a" / "scan.nii.gz", hu().T, LPS)
    save_nifti(tmp_path / "b" / "scan.nii.gz", hu().T, LPS)
    zip_of(tmp_path / "b", tmp_path / "in" / "b.zip")
    write_series(tmp_path / "c" / "series", hu())
    zip_of(tmp_path / "c", tmp_path / "in" / "c.zip")
    cts, rejected = ct_files.find_cts(tmp_path / "in")
    assert rejected == []
    assert [ct.volume for ct in cts] == ["1_2_840_99_7", "a", "b"]
    for ct in cts:
        arrived = pickle.loads(pickle.dumps(ct))  # noqa: S301
        np.testing.assert_array_equal(ct_files.read_ct(arrived).hu, hu())
        assert ct_files.read_grid(arrived).shape == (19, 17, 5)
        assert all(path.is_file() for path in ct.on_disk)


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr", ".hdr"])
def test_a_header_brings_the_file_with_its_voxels(suffix: str, tmp_path: Path, save_nifti: Save) -> None:
    """Out of a zip, too; and both count where files are compared with those of a run before."""
    image = sitk.ReadImage(str(save_nifti(tmp_path / "a.nii", hu().T, LPS)))
    (tmp_path / "in").mkdir()
    sitk.WriteImage(image, str(tmp_path / "in" / f"scan{suffix}"))
    zip_of(tmp_path / "in", tmp_path / "scan.zip")
    for place in (tmp_path / "in", tmp_path / "scan.zip"):
        ((ct,), rejected) = ct_files.find_cts(place)
        assert (ct.volume, rejected, len(ct.files)) == ("scan", [], 2)
        np.testing.assert_array_equal(ct_files.read_ct(ct).hu, hu())


def test_what_is_no_volume_is_passed_over_and_counted(
    tmp_path: Path, write_series: Write, save_nifti: Save, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "ct"
    path = save_nifti(root / "scan.nii.gz", hu().T, LPS)
    write_series(root / "series", hu())
    image = sitk.ReadImage(str(path))
    sitk.WriteImage(image, str(root / "other.mhd"))  # with other.raw
    sitk.WriteImage(image, str(root / "pair.hdr"))  # with pair.img
    systems = ".DS_Store", "._scan.nii.gz", ".hidden/scan.nii.gz", "__MACOSX/scan.nii.gz", "series/Thumbs.db"
    for name in systems:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no volume")
    (root / "series" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for name in ("a.mgz", "b.MGZ", "notes.txt", "scan.raw"):
        (root / name).write_bytes(b"no volume")
    caplog.set_level("INFO")
    cts, rejected = ct_files.find_cts(root)
    assert rejected == []
    assert [ct.volume for ct in cts] == ["1_2_840_99_7", "other", "pair", "scan"]
    assert "Passed over 6 hidden or system files" in caplog.text
    (unread,) = (record for record in caplog.records if record.message.startswith("Not read"))
    assert unread.levelname == "WARNING"
    assert unread.message.startswith("Not read, as no volumes: 2 .mgz, 1 .txt, 1 .raw, such as")
    for ct in cts[1:]:
        np.testing.assert_array_equal(ct_files.read_ct(ct).hu, hu())


def test_a_folder_can_be_left_out_and_so_can_dicom(
    tmp_path: Path, write_series: Write, save_nifti: Save
) -> None:
    write_series(tmp_path / "series", hu())
    save_nifti(tmp_path / "a" / "scan.nii", hu().T, LPS)
    save_nifti(tmp_path / "masks" / "scan.nii", hu().T, LPS)
    cts, rejected = ct_files.find_cts(tmp_path, look=None, leave_out=tmp_path / "a" / ".." / "masks")
    assert ([ct.volume for ct in cts], rejected) == (["scan"], [])


def test_no_room_to_unpack_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = zip_with(tmp_path / "scan.zip", ("a", b""))
    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    _, (rejected,) = ct_sources(archive)
    assert rejected.volume == "scan.zip"
    assert f"Cannot unpack '{archive}' into '{tempfile.gettempdir()}': No space left" in rejected.detail
    assert "TMPDIR" in rejected.detail


# What somebody might pass: name of the file or folder, how it is made, and the reason it is refused for.


def terabytes(path: Path) -> None:
    header = nib.Nifti2Image(np.zeros((2, 2, 2), np.int16), LPS).header
    header.set_data_shape((10**6, 10**6, 10**6))
    header["vox_offset"] = 544
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + 16)))


def sparse(path: Path) -> None:
    """As large as its header says, and yet no bytes on the disk."""
    header = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), LPS).header
    header.set_data_shape((8192, 8192, 8192))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path.write_bytes(header.binaryblock)
    with path.open("r+b") as file:
        file.truncate(352 + 2 * 8192**3)


def flat(path: Path) -> None:
    """Few voxels, but squares of its longer side would be terabytes."""
    image = nib.Nifti2Image(np.full((2 * 10**6, 1, 2), -1000, np.int16), LPS)
    path.write_bytes(gzip.compress(image.to_bytes()))


def far_offset(path: Path) -> None:
    content = bytearray(nib.Nifti1Image(hu().T, LPS).to_bytes())
    content[108:112] = struct.pack("<f", 1e18)
    path.write_bytes(content)


def npz_member(path: Path, text: bytes, data: bytes, version: int = 1) -> None:
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    zip_with(path, ("ct.npy", b"\x93NUMPY" + bytes([version, 0]) + length + text + data))


def npz_shape(shape: str, data: bytes = bytes(24)) -> Callable[[Path], None]:
    text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}, }}".ljust(118).encode()
    return lambda path: npz_member(path, text, data)


def npz_sizes(path: Path) -> None:
    """The zip, too, says that there are terabytes."""
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (8192, 8192, 8192), }".ljust(118)
    npz_member(path, text, bytes(24))
    content, size = bytearray(path.read_bytes()), 2**32 - 2
    place = content.rindex(b"PK\x01\x02")
    content[place + 20 : place + 28] = struct.pack("<2I", size, size)
    path.write_bytes(content)


def dicom(edit: Callable[[int, Dataset], None]) -> Callable[[Path, Write], None]:
    return lambda path, write_series: write_series(path, hu(), edit=edit) and None


def wide(z: int, dataset: Dataset) -> None:
    dataset.Rows = dataset.Columns = 65535


def twice(z: int, dataset: Dataset) -> None:
    dataset.ImagePositionPatient = [0, 0, 1.5 * (z - (z == 3))]


def two_kernels(z: int, dataset: Dataset) -> None:
    dataset.SeriesInstanceUID = ""
    dataset.PixelSpacing = [0.7, 0.7] if z < 3 else [0.5, 0.5]


def deflated_bomb(z: int, dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.add_new(0x00091001, "OB", bytes(2**20))


def lengths(z: int, dataset: Dataset) -> None:
    """GDCM takes a gigabyte and seconds for such a file."""
    dataset.compress(RLELossless)
    dataset.PixelData = dataset.PixelData[:12] + struct.pack("<I", 2**30) + dataset.PixelData[16:]


def of_gigabytes(path: Path, write_series: Write) -> None:
    """PixelSpacing is 4 GB long, as it says."""
    for file in write_series(path, hu()):
        content = bytearray(file.read_bytes())
        place = content.index(b"\x28\x00\x30\x00DS")
        content[place + 4 : place + 12] = b"UN\0\0\xfe\xff\xff\xff"
        file.write_bytes(content)


def missing(path: Path, write_series: Write) -> None:
    write_series(path, hu())[2].unlink()


def overlapping(path: Path) -> None:
    """Many names of one small file: each is packed little, all together much."""
    member = zip_with(path, ("a", bytes(range(256)) * 2**15)).read_bytes()
    place, end = member.index(b"PK\x01\x02"), member.index(b"PK\x05\x06")
    entry, count = bytearray(member[place:end]), 1_100
    entries = bytearray()
    for number in range(count):
        name = f"{number:x}".zfill(8).encode()
        entries += entry[:28] + struct.pack("<H", 8) + entry[30:46] + name
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(entries), place, 0)
    path.write_bytes(member[:place] + bytes(entries) + tail)


def whole() -> bytes:
    return gzip.compress(nib.Nifti1Image(hu().T, LPS).to_bytes())


def half_a_zip(path: Path) -> None:
    path.write_bytes(zip_with(path, ("a", bytes(range(256)))).read_bytes()[:50])


NPZ = "Cannot read .* as npz with an array 'ct':"
HOSTILE: dict[str, tuple[Callable[..., object], str]] = {
    "half.nii.gz": (lambda path: path.write_bytes(whole()[:600]), "as NIfTI: Compressed file ended before"),
    "terabytes.nii.gz": (terabytes, r"bytes for an array of shape \(1000000, 1000000, 1000000\) of int16"),
    "sparse.nii": (sparse, r"a CT must have at most 2,147,483,648 voxels, got shape \(8192, 8192, 8192\)"),
    "flat.nii.gz": (flat, r"a CT must be at most 2500 mm long, got 1400000 mm: shape \(2000000, 1, 2\)"),
    "offset.nii": (far_offset, "Cannot read .* as NIfTI: 3.* bytes for an array"),
    "shape.npz": (npz_shape("(8192, 8192, 8192)"), r"must hold 1099511627904 bytes of 'ct', got 152"),
    "sizes.npz": (npz_sizes, rf"{NPZ} \d+ bytes for an array of 4294967294"),
    "negative.npz": (npz_shape("(-2, -2, 3)"), r"volume must have 3 axes, got shape \(-2, -2, 3\)"),
    "text.npz": (npz_shape("'''"), f"{NPZ} .*EOF"),
    "deep.npz": (npz_shape("(" * 900), f"{NPZ} .*EOF"),
    "header.npz": (lambda path: npz_member(path, b" " * 2**24, b"", version=2), f"{NPZ} EOF: reading array"),
    "wide": (dicom(wide), "Cannot read .* as DICOM: it is too short for 1 x 65535 x 65535 pixels"),
    "twice": (dicom(twice), "slices must lie at different positions, got the same for .* Keep one of each"),
    "missing": (missing, "mostly 1.5 mm, got 3 mm from .* export the series again"),
    "mixed": (dicom(two_kernels), "slices must share PixelSpacing, got .* in '.*' and .* in '"),
    "lengths": (dicom(lengths), "Cannot read .* as DICOM: .*fragment"),
    "deflated": (dicom(deflated_bomb), "Cannot read .* as DICOM: it is deflated"),
    "gigabytes": (of_gigabytes, "(SamplesPerPixel|RescaleSlope|Rows|PixelSpacing) must be .* got .* in '"),
    "bomb.zip": (lambda path: zip_with(path, ("scan.nii", bytes(2**24))), "200 times: .* If you trust it"),
    "overlapping.zip": (overlapping, "9,227,468,800 bytes, more than 8,589,934,592"),
    "outside.zip": (
        lambda path: zip_with(path, ("../../x.nii", b"")),
        r"the name '\.\./\.\./x\.nii' leads out",
    ),
    "nested.zip": (lambda path: zip_with(path, ("a/inner.zip", b"")), "holds another zip, 'inner.zip'"),
    "half.zip": (half_a_zip, "Cannot unpack '.*half.zip'"),
}


def refusals(path: Path) -> list[str]:
    """What is said of the volumes of a path, none of which can be read."""
    sources, rejected = ct_sources(path)
    said = [item.detail for item in rejected]
    for source in sources:
        with pytest.raises(RejectedError) as refused:
            source.read()
        said.append(refused.value.of(source.volume).detail)
    return said


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_refused_in_a_line_and_costs_no_memory(
    name: str, tmp_path: Path, write_series: Write
) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / "input" / name
    path.parent.mkdir()
    make(path) if path.suffix else make(path, write_series)
    ct_files.find_cts(path)  # imports what it needs before memory is counted
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    said = refusals(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20
    assert sorted(tmp_path.rglob("*")) == before
    assert said
    for line in said:
        assert name in line
        assert "\n" not in line
        assert re.search(message, line), line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nifti", "dicom", "zip", "enhanced", "run lengths", "images", "geometry"])
def test_no_damage_ends_otherwise_than_in_a_refusal(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded, some of the cases that ``tests/fuzz.py`` tries for as long as one likes."""
    monkeypatch.setattr(fuzz, "SECONDS", 0)  # no alarm
    good = tmp_path / "good"
    good.mkdir()
    fuzz.KINDS[kind][0](good)
    for seed in range(60):
        assert fuzz.run_case(kind, good, tmp_path / f"{seed}", seed) is None


@pytest.mark.parametrize("suffix", VOLUME_SUFFIXES)
def test_the_suffix_is_no_part_of_a_name_in_any_case(suffix: str) -> None:
    for written in (suffix, suffix.upper(), suffix.title(), ""):
        assert volume_name(f"train_1_a_1{written}") == "train_1_a_1"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "/data/ct/train_1_a_1.nii.gz",
            "C:\\ct\\train_1_a_1.nii",
            ' "train_1_a_1" ',
            "'train_1_a_1.NII'\r\n",
        ),
        *("a b/train_1_a_1/", "train_1_a_1.img.gz"),
    ],
)
def test_folders_quotes_and_blanks_are_no_part_of_a_name(text: str) -> None:
    assert volume_name(text) == "train_1_a_1"


def test_dots_and_blanks_become_underscores_as_in_names_of_series() -> None:
    uid = "1.3.6.1.4.1.9328.50.4.0175"
    assert volume_name(f"{uid}.nii.gz") == volume_name(uid) == series_volume(uid)
    assert volume_name("Patient 01.mha") == "Patient_01"


def test_names_of_any_characters_are_safe_stable_and_different() -> None:
    rng = np.random.default_rng(0)
    letters = [*string.ascii_letters, *string.digits, *"_-()[]{}#%&+=@!$;,~^äöüßéçñ中文字кир\u0301\x07"]
    texts = {"".join(rng.choice(letters, rng.integers(1, 120))) for _ in range(2000)}
    texts |= {"", "_a", "-a", "a" * 81, "a" * 82, "中", "文", "con:", ".."}
    names = {text: volume_name(text) for text in texts}
    assert all(map(VOLUME_NAME.fullmatch, names.values()))
    assert len(set(names.values())) == len(texts)
    assert all(volume_name(name) == name for name in names.values())


def test_names_of_bytes_that_are_no_text_are_safe_and_differ() -> None:
    names = {volume_name(os.fsdecode(text)) for text in (b"M\xfcller.nii", b"M\xe4ller.nii", b"Mller.nii")}
    assert len(names) == 3
    assert all(map(VOLUME_NAME.fullmatch, names))


def test_one_letter_written_in_two_ways_is_one_name() -> None:
    """As macOS and others write an umlaut into the name of a file."""
    assert volume_name("M\u00fcller.nii") == volume_name("Mu\u0308ller.nii")


def test_a_name_that_is_not_unique_takes_its_folders_and_then_its_path() -> None:
    paths = "a/ct.nii", "b/ct.nii.gz", "b/x.nii", "c/d/y.nii", "e/d/y.nii", "ct2.nii", "b.nii"
    names = unique_names([Path(path) for path in paths])
    assert [names[Path(path)] for path in paths] == ["a", "b_ct", "x", "c_d_y", "e_d_y", "ct2", "b"]


def test_what_no_folder_tells_apart_keeps_one_name() -> None:
    names = unique_names([Path("x/a.b.nii"), Path("x/a b.mha"), Path("c.nii"), Path("c.nrrd")])
    assert [*names.values()] == ["a_b", "a_b", "c", "c"]


PLACES = {
    "s0": Path("set/s0/ct.nii.gz"),
    "s1": Path("set/s1/ct.nii.gz"),
    "one_a": Path("one/a.nii"),
    "p_one_a": Path("p/one/a.nii"),
    "b": Path("x/b.mha"),
}


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("s0", "s0"),
        ("s0/ct.nii.gz", "s0"),
        ("/mnt/other/set/s1/ct.NII.GZ", "s1"),
        ("D:\\set\\s1\\ct.nii.gz", "s1"),
        ("b", "b"),
        ("b.nii.gz", "b"),  # as another format
        ("elsewhere/b.nii", "b"),
        ("p/one/a.nii", "p_one_a"),
        ("one/a.nii", None),  # either of two
        ("ct.nii.gz", None),
        ("s2/ct.nii.gz", None),
    ],
)
def test_a_list_names_volumes_by_name_or_by_path(text: str, volume: str | None) -> None:
    found, absent = find_named([text], PLACES)
    assert (found, absent) == (({volume}, []) if volume else (set(), [text]))


def test_files_of_users_come_in_order_without_those_of_systems(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "b/a.nii", "a ü/c d/x.dcm", "z.txt", "a.nii"
    hidden = "._a.nii .cache/x.nii __MACOSX/a.nii b/.DS_Store b/THUMBS.DB desktop.ini DICOMDIR".split()
    touch(tmp_path, *names, *hidden)
    caplog.set_level("INFO")
    rejected: list[RejectedVolume] = []
    found = [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path, rejected)]
    assert (found, rejected) == (["a.nii", "z.txt", "a ü/c d/x.dcm", "b/a.nii"], [])
    assert "Passed over 7 hidden or system files" in caplog.text
    found = [path.name for path in walk(tmp_path, rejected, leave_out=tmp_path / "b")]
    assert found == ["a.nii", "z.txt", "x.dcm"]


def test_links_to_folders_are_not_followed_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "real/a.nii")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "lost.nii").symlink_to("nowhere")
    assert [path.name for path in walk(tmp_path, [])] == ["lost.nii", "a.nii"]
    assert "loop' is a link to a folder and is not searched" in caplog.text


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


def test_a_folder_without_permission_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)  # pytest's own folder is closed to others
    with tempfile.TemporaryDirectory() as place:
        folder = touch(Path(place), "a.nii", "closed/b.nii")
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        rejected: list[RejectedVolume] = []
        with permissions():
            assert [path.name for path in walk(folder, rejected)] == ["a.nii"]
            assert list(volume_files(folder)) == ["a"]
        (folder / "closed").chmod(0o755)
    said = f"Cannot read folder '{folder / 'closed'}': Permission denied."
    assert rejected == [RejectedVolume("closed", "unreadable", said)]
    assert said in caplog.text


def test_volumes_are_listed_by_the_names_of_their_files(tmp_path: Path) -> None:
    touch(tmp_path, "b/train 2.NII.GZ", "a ü/c d/train_1.mha", "b/notes.nii.txt", "a ü/train_2.nii", "x.npz")
    found = volume_files(tmp_path)
    assert {volume: len(files) for volume, files in found.items()} == {"train_1": 1, "train_2": 2}
    assert list(volume_files(tmp_path, [".npz"])) == ["x"]
    assert only_file(found["train_1"], "volumes").name == "train_1.mha"
    with pytest.raises(
        RejectedError, match=r"duplicate: 2 volumes have one name, .*train_2\.nii' and '.*\.GZ'"
    ):
        only_file(found["train_2"], "volumes")
