"""How one CT slice and one mask are compressed inside a shard, both without loss.

Shapes: H rows, W columns.
"""

import struct
import zlib
from operator import attrgetter

import blosc2
import numpy as np

from common.cohort.cohort import load_labels

MASK_SIZE_PX = 128
NUM_TS_CLASSES = len(load_labels("totalsegmentator"))
REX_CODES = tuple(map(attrgetter("code"), load_labels("rexgroundingct")))

# Rows of a compressed block; 128 rows of a 512 pixel slice are 128 KiB, which a core's cache holds.
_BLOCK_ROWS = 128
# The 2 of the byte delta is the item size: left to Blosc2, a chunk could not be decompressed on its own.
_COMPRESSION = blosc2.CParams(
    codec=blosc2.Codec.ZSTD,
    clevel=1,
    filters=[blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA],
    filters_meta=[0, 2],
    nthreads=1,
)
# Blosc2 holds the interpreter's lock by default, so that threads would decode one after the other.
blosc2.set_releasegil(True)

_UINT32 = struct.Struct(">I")
_PNG_SIZE = struct.Struct(">IIB")  # columns, rows, bits


def encode_ct(ct_slice: np.ndarray) -> bytes:
    """Compress one CT slice without loss: Blosc2 with byte shuffle, byte delta and zstd level 1, one thread.

    Any reader of Blosc2 opens the frame, which states shape, type and filters. All of int16 comes back, of
    which shards use ``STORED_HU_RANGE``. A slice of a real scan takes 220 KiB (1 mm, sharp) or 170 KiB (2 mm,
    soft), where float16 takes 512.

    Source: our choice, by docs/slice_codecs.md.

    Args:
        ct_slice: ``(H, W)`` int16 HU, in any memory layout.

    Raises:
        ValueError: if the slice is empty or not two-dimensional int16.
    """
    if ct_slice.ndim != 2 or ct_slice.dtype != np.int16 or ct_slice.size == 0:
        raise ValueError(
            f"ct_slice must be int16 of shape (H, W), got {ct_slice.dtype} of shape {ct_slice.shape}."
        )
    rows, columns = ct_slice.shape
    frame: bytes = blosc2.asarray(
        np.ascontiguousarray(ct_slice),
        chunks=(rows, columns),
        blocks=(min(rows, _BLOCK_ROWS), columns),
        cparams=_COMPRESSION,
    ).to_cframe()
    return frame


def decode_ct(data: bytes) -> np.ndarray:
    """Decompress a slice of ``encode_ct`` to int16 HU ``(H, W)``; threads decode at the same time.

    A frame has no checksum: damage to its pixels may pass unnoticed here. The index of a shard has one of
    every member.

    Raises:
        ValueError: if the frame is not whole or holds anything but one slice of int16.
    """
    try:
        array = blosc2.ndarray_from_cframe(data)
        dtype, chunk = array.dtype, array.schunk.get_chunk(0)
        stored_bytes = blosc2.get_cbuffer_sizes(chunk)[0]
    except (RuntimeError, SyntaxError, TypeError, ValueError) as error:
        raise _not_whole(data, error) from error
    if array.ndim != 2 or dtype != np.int16:
        raise ValueError(f"CT slice must be int16 of shape (H, W), got {dtype} of shape {array.shape}.")
    # One chunk of blocks of whole rows holds the rows in their order, and after them those that fill its last
    # block. It is decompressed by itself because array[:] keeps the interpreter's lock whatever is set above.
    rows, columns = array.shape
    stored_rows = -(-rows // array.blocks[0]) * array.blocks[0]
    if (array.chunks, array.blocks[1], stored_bytes) != ((rows, columns), columns, 2 * stored_rows * columns):
        raise _not_whole(data, f"chunks {array.chunks} in blocks {array.blocks}, {stored_bytes} bytes")
    ct_slice = np.empty((stored_rows, columns), np.int16)
    try:
        blosc2.decompress2(chunk, dst=ct_slice, nthreads=1)
    except (RuntimeError, ValueError) as error:
        raise _not_whole(data, error) from error
    return ct_slice[:rows]


def _not_whole(data: bytes, error: object) -> ValueError:
    return ValueError(f"CT slice must be a whole Blosc2 frame of encode_ct, got {len(data)} bytes ({error}).")


def encode_mask(mask: np.ndarray) -> bytes:
    """Compress a mask without loss as a grey PNG of 8 or 16 bits, which any reader of PNG opens.

    Rows are stored without PNG's differences, which suit photographs: label maps are a third smaller without.

    Source: our choice, by docs/slice_codecs.md. A real 128 x 128 label map takes 0.75 KiB.

    Args:
        mask: ``(H, W)`` uint8 or uint16.

    Raises:
        ValueError: if the mask is empty or has another type or number of axes.
    """
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.uint16) or mask.size == 0:
        raise ValueError(
            f"mask must be uint8 or uint16 of shape (H, W), got {mask.dtype} of shape {mask.shape}."
        )
    (rows, columns), item_bytes = mask.shape, mask.itemsize
    lines = np.zeros((rows, 1 + columns * item_bytes), np.uint8)
    lines[:, 1:] = np.ascontiguousarray(mask, f">u{item_bytes}").view(np.uint8)
    pixels = b"IDAT" + zlib.compress(lines.data)
    return b"".join((_png_head(rows, columns, item_bytes), _png_chunk(pixels), _png_chunk(b"IEND")))


def decode_mask(data: bytes) -> np.ndarray:
    """Decompress a mask of ``encode_mask``, in less than half the time that Pillow takes.

    Raises:
        ValueError: if the PNG is damaged or not one that ``encode_mask`` writes.
    """
    try:
        columns, rows, bits = _PNG_SIZE.unpack_from(data, 16)
        size = _UINT32.unpack_from(data, 33)[0]
        pixels = data[37 : 41 + size]
        is_grey = bits in (8, 16) and data[:33] == _png_head(rows, columns, bits // 8)
        if not is_grey or data[33 : 45 + size] != _png_chunk(pixels):
            raise ValueError("another kind of picture, or a wrong checksum")
        lines = np.frombuffer(zlib.decompress(pixels[4:]), np.uint8)
        lines = lines.reshape(rows, 1 + columns * bits // 8)
        if lines[:, 0].any():
            raise ValueError("rows stored as differences")
    except (struct.error, ValueError, zlib.error) as error:
        raise ValueError(
            f"mask must be a whole grey PNG of encode_mask, got {len(data)} bytes ({error})."
        ) from error
    return np.ascontiguousarray(lines[:, 1:]).view(f">u{bits // 8}").astype(f"u{bits // 8}")


def _png_head(rows: int, columns: int, item_bytes: int) -> bytes:
    """Return signature and header; its zeros: grey, deflate, the one set of row filters, not interlaced."""
    header = _PNG_SIZE.pack(columns, rows, 8 * item_bytes) + bytes(4)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR" + header)


def _png_chunk(chunk: bytes) -> bytes:
    """Put its length before a chunk, which starts with the four letters of its kind, and its CRC behind."""
    return _UINT32.pack(len(chunk) - 4) + chunk + _UINT32.pack(zlib.crc32(chunk))
