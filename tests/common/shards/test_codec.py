import io
import re
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from common.ct.geometry import STORED_HU_RANGE, axial_slices
from common.shards.codec import NUM_TS_CLASSES, REX_CODES, decode_ct, decode_mask, encode_ct, encode_mask

LOWEST, HIGHEST = STORED_HU_RANGE


def ct_like(shape: tuple[int, int] = (211, 307)) -> np.ndarray:
    """Air, soft tissue and bone with the noise of a scanner, over the whole range that is stored."""
    rng = np.random.default_rng(0)
    tissue = rng.choice([-1024, -850, 40, 3071], size=shape)
    return (tissue + rng.normal(0, 20, shape)).clip(-1024, 3071).astype(np.int16)


# Rows and columns on either side of a block of 128 rows and of the 16 bytes that a processor takes at once.
@pytest.mark.parametrize("rows", [1, 2, 15, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("columns", [1, 3, 16, 17, 511, 1024])
def test_ct_of_every_size_comes_back_exactly(rows: int, columns: int) -> None:
    rng = np.random.default_rng([rows, columns])
    for ct in (
        ct_like((rows, columns)),
        rng.integers(LOWEST, HIGHEST, (rows, columns), np.int16, endpoint=True),
        rng.choice(np.array([LOWEST, HIGHEST], np.int16), (rows, columns)),
        np.full((rows, columns), LOWEST, np.int16),
        np.full((rows, columns), HIGHEST, np.int16),
        np.zeros((rows, columns), np.int16),
    ):
        before = ct.copy()
        decoded = decode_ct(encode_ct(ct))
        assert decoded.dtype == np.int16
        np.testing.assert_array_equal(decoded, before)
        np.testing.assert_array_equal(ct, before)


def test_the_whole_range_of_int16_comes_back() -> None:
    ct = np.arange(-(2**15), 2**15, dtype=np.int16).reshape(256, 256)
    np.testing.assert_array_equal(decode_ct(encode_ct(ct)), ct)


def test_a_view_of_a_volume_is_encoded_as_its_values() -> None:
    volume = np.stack([ct_like((13, 11)), ct_like((13, 11))[::-1]], axis=-1)
    view = volume.transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_array_equal(decode_ct(encode_ct(view[0])), view[0])
    read_only = np.broadcast_to(np.arange(7, dtype=np.int16), (5, 7))
    np.testing.assert_array_equal(decode_ct(encode_ct(read_only)), read_only)


def test_a_decoded_slice_is_an_array_of_its_own() -> None:
    frame = encode_ct(ct_like((130, 9)))
    decoded = decode_ct(frame)
    assert decoded.flags.c_contiguous
    decoded[:] = 0
    np.testing.assert_array_equal(decode_ct(frame), ct_like((130, 9)))


def test_any_reader_of_blosc2_opens_a_slice() -> None:
    """The frame states shape, type and filters itself: nothing of ours is needed to read it."""
    array = blosc2.ndarray_from_cframe(encode_ct(ct_like()))
    assert array.dtype == np.int16
    np.testing.assert_array_equal(array[:], ct_like())
    assert array.schunk.cparams.codec == blosc2.Codec.ZSTD
    assert array.schunk.cparams.clevel == 1
    assert array.schunk.cparams.filters[:2] == [blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA]


def test_noise_costs_its_entropy_and_little_more() -> None:
    """A slice of white noise that spans 256 values holds one byte a pixel, its constant high byte nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), np.int16)
    assert 2**18 < len(encode_ct(noise)) < 1.01 * 2**18


def test_one_slice_has_one_encoding() -> None:
    assert encode_ct(ct_like()) == encode_ct(ct_like().copy())
    assert encode_ct(ct_like()) == encode_ct(np.asfortranarray(ct_like()))
    mask = ct_like().astype(np.uint16)
    assert encode_mask(mask) == encode_mask(mask.copy())


@pytest.mark.parametrize(
    "ct",
    [
        np.zeros((3, 5), np.float32),
        np.zeros((3, 5), np.uint16),
        np.zeros((2, 3, 5), np.int16),
        np.zeros((0, 5), np.int16),
        np.zeros((3, 5), np.dtype(np.int16).newbyteorder("S")),
    ],
)
def test_only_int16_slices_are_encoded(ct: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"ct_slice must be int16 of shape \(H, W\), got"):
        encode_ct(ct)


@pytest.mark.parametrize("shape", [(211, 307), (1, 3)])
def test_a_slice_cut_off_anywhere_is_refused(shape: tuple[int, int]) -> None:
    frame = encode_ct(ct_like(shape))
    cut = [frame[:length] for length in range(0, len(frame), max(1, len(frame) // 300))]
    for damaged in (b"no frame", bytes(len(frame)), frame[:-1], *cut):
        with pytest.raises(ValueError, match=f"whole Blosc2 frame.*got {len(damaged)} bytes"):
            decode_ct(damaged)


@pytest.mark.filterwarnings("ignore:Data type alias:DeprecationWarning")
def test_flipped_bits_of_the_head_end_in_an_error_or_in_a_slice() -> None:
    """No flip ends the process or in another error than ValueError; many are noticed."""
    frame = encode_ct(ct_like((129, 65)))
    noticed = 0
    flips = [(byte, bit) for byte in range(280) for bit in range(8)]
    for byte, bit in flips:
        damaged = bytearray(frame)
        damaged[byte] ^= 1 << bit
        try:
            assert decode_ct(bytes(damaged)).dtype == np.int16
        except ValueError:
            noticed += 1
    assert noticed > len(flips) // 3


def test_frames_of_other_arrays_are_refused() -> None:
    for dtype, shape in ((np.float32, (3, 5)), (np.int16, (2, 3, 5))):
        frame = blosc2.asarray(np.zeros(shape, dtype)).to_cframe()
        with pytest.raises(ValueError, match=rf"got {np.dtype(dtype)} of shape {re.escape(str(shape))}"):
            decode_ct(frame)


@pytest.mark.parametrize(("chunks", "blocks"), [((64, 64), (64, 64)), ((64, 128), (32, 32))])
def test_frames_whose_rows_lie_in_another_order_are_refused(
    chunks: tuple[int, int], blocks: tuple[int, int]
) -> None:
    frame = blosc2.asarray(ct_like((64, 128)), chunks=chunks, blocks=blocks).to_cframe()
    with pytest.raises(ValueError, match="CT slice must be a whole Blosc2 frame of encode_ct"):
        decode_ct(frame)


@pytest.mark.real_ct
@pytest.mark.parametrize(
    ("name", "most_kib"),
    [
        # the sharper of the two is nearly noise: HTJ2K takes 212 KiB
        ("lidc_idri_0314_ct_native_slices130_162.nii.gz", 225),
        ("totalseg_dicom_ct_native.nii.gz", 0.4 * 512),
    ],
)
def test_real_ct_comes_back_exactly_and_small(real_ct_dir: Path, name: str, most_kib: float) -> None:
    image = nib.load(real_ct_dir / name)
    slices = axial_slices(np.asanyarray(image.dataobj), image.affine)[0][::4]
    slices = slices.clip(LOWEST, HIGHEST).astype(np.int16)
    assert slices.shape[1:] == (512, 512)
    frames = [encode_ct(ct) for ct in slices]
    for frame, ct in zip(frames, slices, strict=True):
        np.testing.assert_array_equal(decode_ct(frame), ct)
    assert np.mean([len(frame) for frame in frames]) / 1024 < most_kib


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(127, 131), (1, 1), (1, 128), (128, 1)])
def test_masks_come_back_exactly(dtype: type, shape: tuple[int, int]) -> None:
    """Here, and in Pillow."""
    rng = np.random.default_rng(0)
    for mask in (
        rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True),
        np.zeros(shape, dtype),
        np.full(shape, np.iinfo(dtype).max, dtype),
        (rng.random(shape) > 0.99).astype(dtype),
        np.asfortranarray(rng.integers(0, 118, shape, dtype))[::-1],
    ):
        png = encode_mask(mask)
        decoded = decode_mask(png)
        assert decoded.dtype == dtype
        assert decoded.flags.writeable
        np.testing.assert_array_equal(decoded, mask)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png), formats=("PNG",))), mask)


def test_masks_of_other_types_are_refused() -> None:
    for dtype, shape in ((np.int32, (3, 5)), (np.uint8, (2, 3, 5)), (np.uint8, (0, 5))):
        with pytest.raises(ValueError, match=rf"mask must be .*got {np.dtype(dtype)} of shape"):
            encode_mask(np.zeros(shape, dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_flipped_bit_and_every_cut_of_a_mask_is_noticed(dtype: type) -> None:
    mask = np.arange(35, dtype=dtype).reshape(5, 7) // 4
    png = encode_mask(mask)
    pixels_end = len(png) - 12  # what follows only says that the file ends
    for byte in range(pixels_end):
        damaged = [
            png[:byte],
            *(png[:byte] + bytes([png[byte] ^ 1 << bit]) + png[byte + 1 :] for bit in range(8)),
        ]
        for data in damaged:
            with pytest.raises(ValueError, match=f"mask must be a whole grey PNG .*got {len(data)} bytes"):
                decode_mask(data)


@pytest.mark.parametrize("mode", ["RGB", "P", "1", "LA"])
def test_pictures_of_other_kinds_are_no_masks(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (3, 5)).save(buffer, format="PNG")
    with pytest.raises(ValueError, match="mask must be a whole grey PNG of encode_mask"):
        decode_mask(buffer.getvalue())


def test_a_mask_with_row_filters_is_refused_rather_than_misread() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7)).save(buffer, format="PNG")
    with pytest.raises(ValueError, match="rows stored as differences"):
        decode_mask(buffer.getvalue())


def test_codes_and_classes_are_those_of_the_label_lists() -> None:
    assert (len(REX_CODES), REX_CODES[0], REX_CODES[13], NUM_TS_CLASSES) == (14, "1a", "2h", 118)
