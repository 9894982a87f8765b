import io
import zlib

import blosc2
import numpy as np
import pytest
from PIL import Image

from common.data.slice_codec import decode_ct, decode_mask, encode_ct, encode_mask


def ct_like(shape: tuple[int, int] = (211, 307)) -> np.ndarray:
    """Air, soft tissue and bone with the noise of a scanner, over the whole range that is stored."""
    rng = np.random.default_rng(0)
    tissue = rng.choice([-1024, -850, 40, 3071], size=shape)
    return (tissue + rng.normal(0, 20, shape)).clip(-1024, 3071).astype(np.int16)


@pytest.mark.parametrize("shape", [(211, 307), (512, 512), (1, 1), (3, 1024), (1024, 7)])
def test_ct_comes_back_exactly(shape: tuple[int, int]) -> None:
    ct = ct_like(shape)
    decoded = decode_ct(encode_ct(ct))
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, ct)


def test_the_whole_range_of_int16_comes_back() -> None:
    ct = np.arange(-(2**15), 2**15, dtype=np.int16).reshape(256, 256)
    np.testing.assert_array_equal(decode_ct(encode_ct(ct)), ct)


def test_a_view_of_a_volume_is_encoded_as_its_values() -> None:
    volume = np.stack([ct_like((13, 11)), ct_like((13, 11))[::-1]], axis=-1)
    view = volume.transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_array_equal(decode_ct(encode_ct(view[0])), view[0])


def test_any_reader_of_blosc2_opens_a_slice() -> None:
    """The frame states shape and type itself: zstd level 1 behind a byte shuffle, decoded by one thread."""
    array = blosc2.ndarray_from_cframe(encode_ct(ct_like()))
    assert array.shape == (211, 307)
    assert array.dtype == np.int16
    assert array.schunk.cparams.codec == blosc2.Codec.ZSTD
    assert array.schunk.cparams.clevel == 1
    assert blosc2.Filter.SHUFFLE in array.schunk.cparams.filters
    assert array.schunk.dparams.nthreads == 1


def test_one_slice_has_one_encoding() -> None:
    assert encode_ct(ct_like()) == encode_ct(ct_like().copy())
    mask = ct_like().astype(np.uint16)
    assert encode_mask(mask) == encode_mask(mask.copy())


@pytest.mark.parametrize(
    "ct", [np.zeros((3, 5), np.float32), np.zeros((2, 3, 5), np.int16), np.zeros((0, 5), np.int16)]
)
def test_only_int16_slices_are_encoded(ct: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"ct_slice must be int16 of shape \(H, W\), got"):
        encode_ct(ct)


def test_a_slice_that_is_not_whole_is_refused() -> None:
    frame = encode_ct(ct_like())
    for damaged in (b"", b"no frame", frame[:1000], frame[:-100], bytes(len(frame))):
        with pytest.raises(
            ValueError, match=f"CT slice must be a whole Blosc2 frame, got {len(damaged)} bytes"
        ):
            decode_ct(damaged)


def test_frames_of_other_arrays_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"CT slice must be int16 of shape \(H, W\), got float32 of shape \(3, 5\)"
    ):
        decode_ct(blosc2.asarray(np.zeros((3, 5), np.float32)).to_cframe())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_come_back_exactly(dtype: type) -> None:
    mask = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (127, 131), dtype, endpoint=True)
    decoded = decode_mask(encode_mask(mask))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, mask)


def test_masks_of_other_types_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"mask must be uint8 or uint16 of shape \(H, W\), got int32 of shape \(3, 5\)"
    ):
        encode_mask(np.zeros((3, 5), np.int32))
    with pytest.raises(ValueError, match=r"got uint8 of shape \(2, 3, 5\)"):
        encode_mask(np.zeros((2, 3, 5), np.uint8))


def test_damaged_masks_are_refused() -> None:
    png = encode_mask(ct_like().astype(np.uint16))
    swapped = png[:2000] + zlib.compress(b"x") * 10 + png[2000:]
    for damaged in (b"", b"no png", png[:-2000], swapped):
        with pytest.raises(ValueError, match=f"mask must be a whole PNG, got {len(damaged)} bytes"):
            decode_mask(damaged)


def test_coloured_pictures_are_no_masks() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 5)).save(buffer, format="PNG")
    with pytest.raises(ValueError, match="mask must be a grey PNG of 8 or 16 bits, got mode RGB"):
        decode_mask(buffer.getvalue())
