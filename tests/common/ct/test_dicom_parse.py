"""Files without a preamble, meta information or either are read; what is no DICOM file is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from common.ct.dicom import read_ct
from common.ct.dicom_files import AXIAL_CT, DAMAGED, NO_IMAGE, look_at, sort_series
from common.ct.rejection import RejectedError

Write = Callable[..., list[Path]]
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
    (series,), rejected = sort_series(found)
    assert (len(series.files), rejected) == (5, [])
    np.testing.assert_array_equal(read_ct(series.files).hu, HU)


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
