"""Enhanced CT: where frames lie and what their values mean stands in functional groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.tag import Tag
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from common.ct.dicom import read_ct, read_grid
from common.ct.dicom_files import AXIAL_CT, DAMAGED, LOCALIZER, NO_IMAGE, REFORMAT, look_at, sort_series
from common.ct.rejection import NOT_AXIAL_CT, RejectedError
from tests.fuzz_dicom import frames_of

Write = Callable[..., list[Path]]


def canonical() -> np.ndarray:
    """HU that all differ, as (Z, H, W)."""
    return np.random.default_rng(5).permutation(7 * 11 * 13).reshape(7, 11, 13).astype(np.int16) - 500


@pytest.fixture
def classic(tmp_path: Path, write_series: Write) -> list[Path]:
    return write_series(tmp_path / "classic", canonical())


RESCALE = "PixelValueTransformationSequence"
SHARED = ("PixelMeasuresSequence", "PlaneOrientationSequence", RESCALE)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shared", [(), SHARED])
@pytest.mark.parametrize("sop_class", [EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage])
def test_many_frames_are_the_slices_of_the_classic_series(
    sop_class: str, shared: tuple[str, ...], compress: bool, classic: list[Path], tmp_path: Path
) -> None:
    """Frames in an order of their own, some in another file."""
    order = [classic[z] for z in (3, 0, 6, 2, 5)]
    files = [
        frames_of(tmp_path / "a", order, shared, sop_class, compress),
        frames_of(tmp_path / "b", [classic[4], classic[1]], shared, sop_class, compress),
    ]
    ct, expected = read_ct(files), read_ct(classic)
    np.testing.assert_array_equal(ct.hu, canonical())
    np.testing.assert_allclose(ct.grid.affine, expected.grid.affine)
    assert (ct.spacing_mm, ct.grid.shape, ct.values.lowest) == (expected.spacing_mm, (13, 11, 7), -500)
    ((_, paths),), rejected = sort_series(map(look_at, files))
    assert (set(paths), rejected) == (set(files), [])


def test_every_frame_has_its_own_rescale(tmp_path: Path, write_series: Write) -> None:
    rescales = [(1, -1024), (2, -1000), (0.5, -900.25), (1, 0), (3, -7), (1, -2), (1, -900)]

    def edit(z: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = rescales[z]

    files = write_series(tmp_path / "classic", canonical(), edit=edit)
    ct = read_ct([frames_of(tmp_path / "a", files)])
    for hu, voxels, (slope, intercept) in zip(ct.hu, canonical(), rescales, strict=True):
        np.testing.assert_array_equal(
            hu, np.rint((voxels.astype(int) + 1024) * slope + intercept).clip(-1024, 3071)
        )


def test_a_copy_of_a_file_of_many_frames_counts_once(classic: list[Path], tmp_path: Path) -> None:
    file = frames_of(tmp_path / "a", classic)
    (tmp_path / "b").write_bytes(file.read_bytes())
    ct = read_ct([file, tmp_path / "b"])
    np.testing.assert_array_equal(ct.hu, canonical())
    assert ct.sha256 == read_ct([file]).sha256


def change(path: Path, edit: Callable[[Dataset], None]) -> Path:
    dataset = pydicom.dcmread(path)
    edit(dataset)
    dataset.save_as(path)
    return path


def frames(dataset: Dataset) -> Any:
    return dataset.PerFrameFunctionalGroupsSequence


def two_stacks(dataset: Dataset) -> None:
    for i, group in enumerate(frames(dataset)):
        group.FrameContentSequence[0].StackID = str(i // 4)


def two_times(dataset: Dataset) -> None:
    frames(dataset)[4].PlanePositionSequence = frames(dataset)[2].PlanePositionSequence


def two_planes(dataset: Dataset) -> None:
    frames(dataset)[4].PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda dataset: frames(dataset).clear(), "multi-frame: 'FILE' .* 7 frames lies, got 0 items"),
        (lambda dataset: frames(dataset).pop(), "multi-frame: 'FILE' .* 7 frames lies, got 6 items"),
        (two_stacks, "multi-frame: 'FILE' must hold one stack of slices, got 2"),
        (two_times, "duplicate: .* for 'FILE' frame 3 and 'FILE' frame 5: .*points in time"),
        (two_planes, "geometry: slices must share ImageOrientationPatient, .* in 'FILE' frame 5"),
        (
            lambda dataset: setattr(frames(dataset)[3][RESCALE][0], "RescaleType", "US"),
            "not in HU: RescaleType must be HU or absent, got 'US' in 'FILE' frame 4",
        ),
        (
            lambda dataset: delattr(frames(dataset)[3], RESCALE),
            "metadata: RescaleSlope must be a number, got None in 'FILE' frame 4",
        ),
    ],
)
def test_frames_that_are_no_stack_are_refused(
    edit: Callable[[Dataset], None], message: str, classic: list[Path], tmp_path: Path
) -> None:
    file = change(frames_of(tmp_path / "a", classic), edit)
    for read in (read_grid, read_ct):
        with pytest.raises(RejectedError, match=message.replace("FILE", str(file))):
            read([file])


def test_frames_that_are_cut_off_are_refused(classic: list[Path], tmp_path: Path) -> None:
    file = frames_of(tmp_path / "a", classic)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(RejectedError, match=r"unreadable: Cannot read"):
        read_ct([file])


def test_files_of_frames_are_told_apart_by_their_groups(
    classic: list[Path], tmp_path: Path, write_series: Write
) -> None:
    coronal = write_series(tmp_path / "c", canonical(), orientation=(1, 0, 0, 0, 0, -1))
    bolus = [classic[2]] * 5
    one = frames_of(tmp_path / "one", classic)
    scout = frames_of(tmp_path / "scout", classic[:1])
    change(scout, lambda dataset: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]))
    assert look_at(one).kind == AXIAL_CT
    assert look_at(scout).kind == LOCALIZER
    assert look_at(frames_of(tmp_path / "cor", coronal)).kind == REFORMAT
    series, rejected = sort_series([look_at(frames_of(tmp_path / "bolus", bolus))])
    assert series == []
    assert [(item.reason, item.detail.partition(": ")[2]) for item in rejected] == [
        (NOT_AXIAL_CT, "5 images at one position, as of bolus tracking")
    ]


def test_a_classic_file_of_one_frame_is_a_slice(tmp_path: Path, write_series: Write) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        dataset.NumberOfFrames = 1

    ct = read_ct(write_series(tmp_path, canonical(), edit=edit))
    np.testing.assert_array_equal(ct.hu, canonical())


@pytest.mark.parametrize(
    ("tag", "vr", "value"),
    [
        ("BitsStored", "US", b"\x0c\x00\x10\x00"),  # two numbers
        ("HighBit", "LO", b"high"),
    ],
)
def test_numbers_that_are_none_are_refused(
    tag: str, vr: str, value: bytes, tmp_path: Path, write_series: Write
) -> None:
    def edit(_: int, dataset: Dataset) -> None:
        dataset[tag] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)

    with pytest.raises(RejectedError):
        read_ct(write_series(tmp_path, canonical(), edit=edit))


def test_an_infinite_number_of_frames_is_refused(tmp_path: Path, write_series: Write) -> None:
    def edit(_: int, dataset: Dataset) -> None:
        dataset.NumberOfFrames = 12345

    files = write_series(tmp_path, canonical(), edit=edit)
    for path in files:
        path.write_bytes(path.read_bytes().replace(b"12345 ", b"1e999 "))
    with pytest.raises(RejectedError, match="infinity"):
        read_ct(files)


HU = np.random.default_rng(6).integers(-1000, 3000, (5, 7, 11)).astype(np.int16)


def rewrite(path: Path, syntax: str, meta: bool) -> None:
    """Write a file without a preamble, with or without meta information."""
    dataset = pydicom.dcmread(path)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    buffer = DicomBytesIO()
    if meta:
        dataset.file_meta.TransferSyntaxUID = syntax
        write_file_meta_info(buffer, dataset.file_meta)
    buffer.is_little_endian = syntax != ExplicitVRBigEndian
    buffer.is_implicit_VR = syntax == ImplicitVRLittleEndian
    write_dataset(buffer, dataset)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("charset", [True, False])
@pytest.mark.parametrize("suffix", ["", ".dcm"])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_a_preamble_are_read(
    syntax: str, meta: bool, suffix: str, charset: bool, tmp_path: Path, write_series: Write
) -> None:
    """The last two lack it, and none of the series is dropped."""

    def edit(z: int, dataset: Dataset) -> None:
        if charset:
            dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]

    files = [path.rename(f"{path}{suffix}") for path in write_series(tmp_path, HU, edit=edit)]
    for path in files[3:]:
        rewrite(path, syntax, meta)
        assert path.read_bytes()[128:132] != b"DICM"
    found = [look_at(path) for path in files]
    assert {file.kind for file in found} == {AXIAL_CT}
    ((_, paths),), rejected = sort_series(found)
    assert (len(paths), rejected) == (5, [])
    np.testing.assert_array_equal(read_ct(paths).hu, HU)


def test_meta_information_without_a_transfer_syntax_is_read(tmp_path: Path, write_series: Write) -> None:
    files = write_series(tmp_path, HU)
    for path in files:
        dataset = pydicom.dcmread(path)
        del dataset.file_meta.TransferSyntaxUID
        dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
    np.testing.assert_array_equal(read_ct(files).hu, HU)


def test_compressed_pixels_that_nothing_says_how_to_decode_are_refused(
    tmp_path: Path, write_series: Write
) -> None:
    files = write_series(tmp_path, HU, edit=lambda z, dataset: dataset.compress(RLELossless))
    for path in files:
        rewrite(path, ExplicitVRLittleEndian, meta=False)
    with pytest.raises(
        RejectedError, match=r"unreadable: .*pixels are compressed, and TransferSyntaxUID does not say how"
    ):
        read_ct(files)


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_file_without_a_preamble_that_is_cut_off_is_damaged(
    part: float, tmp_path: Path, write_series: Write
) -> None:
    files = write_series(tmp_path, HU)
    rewrite(files[2], ImplicitVRLittleEndian, meta=False)
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[: int(len(whole) * part)])
    if look_at(files[2]).kind != DAMAGED:
        with pytest.raises(RejectedError, match=f"{files[2]}"):
            read_ct(files)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\x00",
        b"PK\x03\x04" + bytes(300),
        b"\x89PNG\r\n\x1a\n" + bytes(300),
        b"II*\x00\x08\x00\x00\x00" + bytes(300),
        bytes(400),
        b"\x08\x00\x05\x00\xff\xff\xff\x7f" + bytes(300),
        b"SOPClassUID,Modality\n" * 20,
    ],
)
def test_other_files_are_no_dicom(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "IM1").write_bytes(content)
    (tmp_path / "IM1.dcm").write_bytes(content)
    assert look_at(tmp_path / "IM1").kind == NO_IMAGE
    assert look_at(tmp_path / "IM1.dcm").kind == DAMAGED
