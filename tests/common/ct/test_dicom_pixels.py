"""Stored numbers become HU whatever their compression, sign, spare bits and padding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom import Dataset
from pydicom.data import get_testdata_file
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from common.ct.dicom import read_ct
from common.ct.dicom_header import SliceHeader
from common.ct.dicom_pixels import read_hu
from common.ct.geometry import HUValues
from common.ct.rejection import RejectedError

SHAPE_ZYX = (3, 17, 19)
Write = Callable[..., list[Path]]
Compress = Callable[[Path], None]


def canonical() -> np.ndarray:
    """HU that all differ, as (Z, H, W)."""
    voxels = np.random.default_rng(0).permutation(np.prod(SHAPE_ZYX))
    return voxels.reshape(SHAPE_ZYX).astype(np.int16) - 1000


def decoded(path: Path | str) -> np.ndarray:
    """The stored numbers of a file as HU."""
    dataset = pydicom.dcmread(path)
    out = np.empty((dataset.Rows, dataset.Columns), np.int16)
    header = SliceHeader(Path(path), 0, out.shape, (1, 1), np.eye(3)[:2], np.zeros(3), 1, 0, "")
    read_hu(dataset, header, out=out, kept=HUValues())
    return out


def encode(z: int, dataset: Dataset, how: str) -> None:
    values = np.frombuffer(dataset.PixelData, "<u2").reshape(dataset.Rows, dataset.Columns)
    if how == "run lengths, fractions":
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -700.25
        dataset.PixelData = (values * 2).astype("<u2").tobytes()
        dataset.compress(RLELossless)
    elif how == "big endian":
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        dataset.PixelData = values.astype(">u2").tobytes()
    elif how == "32 bits":
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 32, 20, 19
        dataset.PixelData = (values.astype("<u4") | 0x7FF00000).tobytes()
    elif how == "8 bits":
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.RescaleSlope, dataset.RescaleIntercept = 4, -1000
        dataset.PixelData = (values % 251).astype("u1").tobytes() + b"\0"
    elif how in ("floats", "doubles"):
        del dataset.PixelData
        bits, tag = (32, "FloatPixelData") if how == "floats" else (64, "DoubleFloatPixelData")
        dataset.BitsAllocated = dataset.BitsStored = bits
        dataset.HighBit = bits - 1
        setattr(dataset, tag, (values + 0.25).astype(f"<f{bits // 8}").tobytes())


@pytest.mark.parametrize(
    "how", ["run lengths, fractions", "big endian", "32 bits", "8 bits", "floats", "doubles"]
)
def test_pixels_are_decoded_however_they_are_stored(how: str, tmp_path: Path, write_series: Write) -> None:
    ct = read_ct(write_series(tmp_path, canonical(), edit=lambda z, dataset: encode(z, dataset, how)))
    expected = canonical().astype(float)
    if how == "run lengths, fractions":
        expected = np.rint((expected + 1024) - 700.25)
    elif how == "8 bits":
        expected = (expected + 1024) % 251 * 4 - 1000
    np.testing.assert_array_equal(ct.hu, expected)


def run_lengths(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(path)


def by_gdcm(syntax: str) -> Compress:
    def compress(path: Path) -> None:
        gdcm = pytest.importorskip("gdcm")
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()

    return compress


def not_at_all(path: Path) -> None:
    pass


COMPRESSIONS: dict[str, Compress] = {
    "none": not_at_all,
    "run lengths": run_lengths,
    "JPEG": by_gdcm("JPEGLosslessProcess14_1"),
    "JPEG-LS": by_gdcm("JPEGLSLossless"),
    "JPEG 2000": by_gdcm("JPEG2000Lossless"),
}


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("bits", [12, 13, 16])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_compression_gives_the_stored_numbers(
    compression: str, bits: int, is_signed: bool, photometric: str, tmp_path: Path, write_series: Write
) -> None:
    """MONOCHROME1 says how to display. Identifiers may be blank."""
    low = -(2 ** (bits - 1)) if is_signed else 0
    stored = np.random.default_rng(bits).integers(low, low + 2**bits, SHAPE_ZYX)
    stored[0, 0, :2] = low, low + 2**bits - 1
    slope = 0.25

    def edit(z: int, dataset: Dataset) -> None:
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = photometric, int(is_signed)
        dataset.BitsStored, dataset.HighBit = bits, bits - 1
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -24
        dataset.PixelData = stored[z].astype("<u2").tobytes()

    files = write_series(tmp_path, canonical(), edit=edit)
    for path in files:
        COMPRESSIONS[compression](path)
        dataset = pydicom.dcmread(path)
        dataset.SOPInstanceUID = dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPInstanceUID = ""
        dataset.PhotometricInterpretation = photometric  # encoders may invert and say so
        dataset.save_as(path)
    expected = np.rint(stored * slope - 24).clip(-1024, 3071)
    np.testing.assert_array_equal(read_ct(files).hu, expected)


@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("compression", ["none", "run lengths"])
def test_bits_above_those_stored_are_no_part_of_a_value(
    compression: str, is_signed: bool, tmp_path: Path, write_series: Write
) -> None:
    """Overlays, or whatever the memory held."""
    garbage = np.random.default_rng(1).integers(0, 16, SHAPE_ZYX) << 12
    values = np.random.default_rng(2).integers(0, 4096, SHAPE_ZYX) - 2048 * is_signed

    def edit(z: int, dataset: Dataset) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(is_signed)
        dataset.PixelData = (values[z] & 0xFFF | garbage[z]).astype("<u2").tobytes()

    files = write_series(tmp_path, canonical(), edit=edit)
    for path in files:
        COMPRESSIONS[compression](path)
    np.testing.assert_array_equal(read_ct(files).hu, (values - 1024).clip(-1024, 3071))


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_expb.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_padded.dcm"),
    ],
)
def test_real_files_in_every_storage_are_the_same(name: str) -> None:
    """One image of pydicom's tests that was stored by several tools."""
    plain = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False))
    expected = np.frombuffer(plain.PixelData, "<i2").reshape(plain.Rows, plain.Columns)
    np.testing.assert_array_equal(
        decoded(get_testdata_file(name, download=False)), expected.clip(-1024, 3071)
    )


def test_a_codestream_of_another_sign_than_the_header_is_read_as_the_header_says() -> None:
    """JPEG 2000 of 13 bits, decoded by Pillow through pydicom."""
    path = get_testdata_file("J2K_pixelrep_mismatch.dcm", download=False)
    np.testing.assert_array_equal(decoded(path), pydicom.dcmread(path).pixel_array.clip(-1024, 3071))


VALUE, LIMIT = "PixelPaddingValue", "PixelPaddingRangeLimit"
PADDINGS: dict[str, tuple[int, int, dict[str, tuple[str, int]]]] = {
    # how the padding is stored, PixelRepresentation, and the tags with their types
    "signed": (-2000, 1, {VALUE: ("SS", -2000)}),
    "unsigned": (63536, 0, {VALUE: ("US", 63536)}),
    "signed in an unsigned tag": (-2000, 1, {VALUE: ("US", 63536)}),
    "unsigned in a signed tag": (63536, 0, {VALUE: ("SS", -2000)}),
    "a number of the middle": (500, 0, {VALUE: ("US", 500)}),
    "inside of a range": (63000, 0, {VALUE: ("US", 60000), LIMIT: ("US", 65535)}),
    "unsigned bounds of a range around zero": (-5, 1, {VALUE: ("US", 65526), LIMIT: ("US", 10)}),
    "at the end of a range that runs down": (-3000, 1, {VALUE: ("SS", -2000), LIMIT: ("SS", -3000)}),
}


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, RLELossless])
@pytest.mark.parametrize("case", PADDINGS)
def test_padding_is_no_image(case: str, syntax: str | None, tmp_path: Path, write_series: Write) -> None:
    padding, is_signed, tags = PADDINGS[case]
    hu = canonical()
    outside = np.random.default_rng(3).random(SHAPE_ZYX) < 0.3
    outside |= hu == 500 - 1024

    def edit(z: int, dataset: Dataset) -> None:
        dataset.PixelRepresentation = is_signed
        dataset.PixelData = np.where(outside[z], padding, hu[z] + 1024).astype("<u2").tobytes()
        for name, (vr, value) in tags.items():
            dataset.add_new(name, vr, value)
        if syntax == ImplicitVRLittleEndian:
            dataset.file_meta.TransferSyntaxUID = syntax

    files = write_series(tmp_path, hu, edit=edit)
    if syntax == RLELossless:
        for path in files:
            run_lengths(path)
    ct = read_ct(files)
    np.testing.assert_array_equal(ct.hu, np.where(outside, -1024, hu))
    assert ct.values.lowest == hu[~outside].min()


@pytest.mark.parametrize("is_signed", [False, True])
def test_padding_that_the_stored_bits_cannot_hold_is_looked_for_in_whole_words(
    is_signed: bool, tmp_path: Path, write_series: Write
) -> None:
    """12 bits of 63536 are 2096, a value of bone."""
    hu = np.where(canonical() % 2 == 0, canonical(), 2096 - 1024)
    hu[:, 0] = 0

    def edit(z: int, dataset: Dataset) -> None:
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, int(is_signed)
        dataset.RescaleIntercept = 1024 if is_signed else -1024
        values = hu[z].astype(int) - int(dataset.RescaleIntercept)
        values[0] = 63536 if not is_signed else -4000
        dataset.PixelData = values.astype("<u2").tobytes()
        dataset.add_new("PixelPaddingValue", "SS", -4000 if is_signed else -2000)

    expected = hu.copy()
    if is_signed:
        expected = expected.clip(-1024, 3071)
    expected[:, 0] = -1024
    np.testing.assert_array_equal(read_ct(write_series(tmp_path, hu, edit=edit)).hu, expected)


def test_padding_of_floats_is_no_image(tmp_path: Path, write_series: Write) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        encode(z, dataset, "floats")
        values = np.frombuffer(dataset.FloatPixelData, "<f4").copy()
        values[:4] = -9e9
        dataset.FloatPixelData, dataset.FloatPixelPaddingValue = values.tobytes(), np.float32(-9e9)

    ct = read_ct(write_series(tmp_path, canonical(), edit=edit))
    expected = canonical()
    expected[:, 0, :4] = -1024
    np.testing.assert_array_equal(ct.hu, expected)
    assert ct.values.lowest > -1025


def test_padding_alone_is_no_ct(tmp_path: Path, write_series: Write) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        dataset.PixelData = np.full(SHAPE_ZYX[1:], 7, "<u2").tobytes()
        dataset.add_new(VALUE, "US", 7)

    with pytest.raises(RejectedError, match="no image: .* padding"):
        read_ct(write_series(tmp_path, canonical(), edit=edit))


def test_voxels_that_are_not_finite_are_rejected(tmp_path: Path, write_series: Write) -> None:
    def edit(z: int, dataset: Dataset) -> None:
        encode(z, dataset, "floats")
        values = np.frombuffer(dataset.FloatPixelData, "<f4").copy()
        values[7] = np.nan if z == 2 else 0
        dataset.FloatPixelData = values.tobytes()

    files = write_series(tmp_path, canonical(), edit=edit)
    with pytest.raises(RejectedError, match=f"non-finite voxels: .* got NaN or infinity in '{files[2]}'"):
        read_ct(files)


def test_pixels_that_simpleitk_wrote_are_those_it_was_given(tmp_path: Path) -> None:
    values = np.random.default_rng(4).integers(-1024, 3072, (1, 17, 19)).astype(np.int16)
    for compressor in ("JPEG", "JPEG2000"):
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.SetFileName(str(tmp_path / "a.dcm"))
        writer.Execute(SimpleITK.GetImageFromArray(values))
        np.testing.assert_array_equal(decoded(tmp_path / "a.dcm"), values[0])
