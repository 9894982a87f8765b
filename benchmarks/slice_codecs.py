"""Bytes and processor time of the codec of CT slices beside others, and of masks.

    python benchmarks/slice_codecs.py

All are timed in turns in one process, on one thread, in medians of processor time, so that a busy machine
matters less. docs/slice_codecs.md keeps a result and what followed from it. Ends in one line of JSON.
"""

import io
import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import blosc2
import nibabel as nib
import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.ct.geometry import STORED_HU_RANGE, axial_slices
from common.shards.codec import decode_ct, decode_mask, encode_ct, encode_mask

SLICE_SHAPE = (512, 512)
MASK_SHAPE = (128, 128)
REFERENCE, OURS = "float16 npy", "encode_ct (zstd-1, byte delta)"
SHUFFLE, BITSHUFFLE, BYTEDELTA = blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE, blosc2.Filter.BYTEDELTA

Encode = Callable[[np.ndarray], bytes]
Decode = Callable[[bytes], np.ndarray]


class Codec(NamedTuple):
    """A row of a table.

    Args:
        name: shown in it.
        encode: slice to bytes.
        decode: back.
        skipped: why there is nothing to measure; empty otherwise.
    """

    name: str
    encode: Encode
    decode: Decode
    skipped: str = ""


class Figures(NamedTuple):
    """What one codec did with the slices of one scan.

    Args:
        size: bytes a slice, mean.
        encode_s: CPU seconds a slice, median over the repeats.
        decode_s: the same.
        lossless: whether every slice came back with its values.
    """

    size: float
    encode_s: float
    decode_s: float
    lossless: bool


def blosc(name: str, codec: blosc2.Codec, level: int, filters: list[blosc2.Filter]) -> Codec:
    """Blosc2 array frames in blocks of 128 rows, decoded the plain way."""
    parameters = blosc2.CParams(
        codec=codec, clevel=level, filters=filters, filters_meta=[0] * len(filters), nthreads=1
    )

    def encode(ct: np.ndarray) -> bytes:
        blocks = (min(128, len(ct)), ct.shape[1])
        return blosc2.asarray(ct, chunks=ct.shape, blocks=blocks, cparams=parameters).to_cframe()

    return Codec(name, encode, lambda data: blosc2.ndarray_from_cframe(data)[:])


def predicted(name: str, axis: int) -> Codec:
    """Difference of neighbouring pixels with its sign in the lowest bit, then shuffle and zstd level 1."""
    inner = blosc("", blosc2.Codec.ZSTD, 1, [SHUFFLE])

    def encode(ct: np.ndarray) -> bytes:
        step = np.diff(ct, axis=axis, prepend=np.int16(0))
        return inner.encode((step << 1) ^ (step >> 15))

    def decode(data: bytes) -> np.ndarray:
        folded = inner.decode(data)
        step = (folded.view(np.uint16) >> 1).view(np.int16) ^ -(folded & 1)
        return np.add.accumulate(step, axis=axis, dtype=np.int16)

    return Codec(name, encode, decode)


def npy_bytes(ct: np.ndarray) -> bytes:
    """Return a slice as float16 in the format of ``np.save``."""
    buffer = io.BytesIO()
    np.save(buffer, ct.astype(np.float16))
    return buffer.getvalue()


def imagecodecs_rows() -> list[Codec]:
    """Codecs of the optional package imagecodecs, of values from 0."""
    names = ("pcodec level 8", "HTJ2K (OpenJPH)", "JPEG-LS (CharLS)", "JPEG XL effort 1")
    if find_spec("imagecodecs") is None:
        return [Codec(name, bytes, np.frombuffer, "imagecodecs is not installed") for name in names]
    import imagecodecs

    def from_zero(ct: np.ndarray) -> np.ndarray:
        return (ct - STORED_HU_RANGE[0]).astype(np.uint16)

    def hu(values: np.ndarray) -> np.ndarray:
        return values.astype(np.int16) + np.int16(STORED_HU_RANGE[0])

    def unpack(data: bytes) -> np.ndarray:
        return imagecodecs.pcodec_decode(data, shape=SLICE_SHAPE, dtype=np.int16)

    return [
        Codec(names[0], lambda ct: bytes(imagecodecs.pcodec_encode(ct, level=8)), unpack),
        Codec(
            names[1],
            lambda ct: bytes(imagecodecs.htj2k_encode(from_zero(ct), reversible=True)),
            lambda data: hu(imagecodecs.htj2k_decode(data)),
        ),
        Codec(
            names[2],
            lambda ct: bytes(imagecodecs.jpegls_encode(from_zero(ct))),
            lambda data: hu(imagecodecs.jpegls_decode(data)),
        ),
        Codec(
            names[3],
            lambda ct: bytes(imagecodecs.jpegxl_encode(from_zero(ct), lossless=True, effort=1)),
            lambda data: hu(imagecodecs.jpegxl_decode(data)),
        ),
    ]


def ct_codecs() -> list[Codec]:
    """Rows of the table of CT slices."""
    zstd = blosc2.Codec.ZSTD
    openzl = blosc("Blosc2 OpenZL", blosc2.Codec.OPENZL, 1, [])
    if find_spec("blosc2_openzl") is None:
        openzl = openzl._replace(skipped="blosc2-openzl is not installed")
    return [
        Codec(REFERENCE, npy_bytes, lambda data: np.load(io.BytesIO(data))),
        Codec(OURS, encode_ct, decode_ct),
        blosc("Blosc2 zstd-1, shuffle", zstd, 1, [SHUFFLE]),
        blosc("Blosc2 zstd-1, bit shuffle", zstd, 1, [BITSHUFFLE]),
        blosc("Blosc2 zstd-5, byte delta", zstd, 3, [SHUFFLE, BYTEDELTA]),
        blosc("Blosc2 zstd-9, byte delta", zstd, 5, [SHUFFLE, BYTEDELTA]),
        blosc("Blosc2 lz4, shuffle", blosc2.Codec.LZ4, 1, [SHUFFLE]),
        predicted("vertical difference, zstd-1", 0),
        predicted("horizontal difference, zstd-1", 1),
        openzl,
        *imagecodecs_rows(),
    ]


def mask_codecs() -> list[Codec]:
    """Rows of the table of masks."""

    def png(**options: int) -> Encode:
        def encode(mask: np.ndarray) -> bytes:
            buffer = io.BytesIO()
            Image.fromarray(mask).save(buffer, format="PNG", **options)
            return buffer.getvalue()

        return encode

    def unpng(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))

    def inflate(data: bytes) -> np.ndarray:
        return np.frombuffer(zlib.decompress(data), np.uint8).reshape(MASK_SHAPE)

    return [
        Codec("encode_mask (PNG)", encode_mask, decode_mask),
        Codec("PNG, Pillow", png(), unpng),
        Codec("PNG, Pillow, level 9", png(compress_level=9), unpng),
        blosc("Blosc2 zstd-9", blosc2.Codec.ZSTD, 5, []),
        Codec("deflate without PNG", lambda mask: zlib.compress(mask.tobytes()), inflate),
    ]


def cpu_s(function: Callable[..., object], items: list) -> float:
    """Return the CPU seconds an item."""
    start = time.process_time()
    for item in items:
        function(item)
    return (time.process_time() - start) / len(items)


def measure(codecs: list[Codec], slices: list[np.ndarray], repeats: int, title: str) -> dict[str, Figures]:
    """Encode and decode slices by every codec, in turns, so that all share the machine's moods."""
    codecs = [codec for codec in codecs if not codec.skipped]
    frames = [[codec.encode(ct) for ct in slices] for codec in codecs]
    seconds = np.zeros((repeats, len(codecs), 2))
    for turn in track(seconds, title, console=Console(stderr=True), transient=True):
        for row, codec, encoded in zip(turn, codecs, frames, strict=True):
            row[:] = cpu_s(codec.encode, slices), cpu_s(codec.decode, encoded)
    encode_s, decode_s = np.median(seconds, axis=0).T
    figures = {}
    for k, (codec, encoded) in enumerate(zip(codecs, frames, strict=True)):
        lossless = all(
            np.array_equal(codec.decode(frame), ct) for frame, ct in zip(encoded, slices, strict=True)
        )
        size = float(np.mean([len(frame) for frame in encoded]))
        figures[codec.name] = Figures(size, float(encode_s[k]), float(decode_s[k]), lossless)
    return figures


def read_scans(folder: Path, num_slices: int) -> tuple[dict[str, list[np.ndarray]], list[np.ndarray]]:
    """Read slices of 512 x 512 of every CT in a folder, and the masks of its label maps at 128 x 128."""
    scans, masks = {}, []
    for path in sorted(folder.glob("*.nii*")):
        image = nib.nifti1.Nifti1Image.from_filename(path)
        volume = np.asanyarray(image.dataobj)
        slices, _ = axial_slices(volume, image.affine)
        chosen = np.unique(np.linspace(0, len(slices) - 1, num_slices).astype(int))
        if volume.min() < -500 and slices.shape[1:] == SLICE_SHAPE:
            hu = np.rint(slices[chosen]).clip(*STORED_HU_RANGE).astype(np.int16)
            scans[path.name.partition(".")[0]] = list(np.ascontiguousarray(hu))
        elif volume.min() == 0 and volume.max() < 118:
            rows, columns = ((2 * np.arange(128) + 1) * size // 256 for size in slices.shape[1:])
            masks += [np.ascontiguousarray(slices[z][rows][:, columns].astype(np.uint8)) for z in chosen]
    return scans, masks


def synthetic_scan(num_slices: int) -> list[np.ndarray]:
    """Draw a round body with lungs in air, under noise of 25 HU that neighbouring pixels share."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[-1:1:512j, -1:1:512j]
    body = np.where(row**2 + column**2 < 0.6, 40.0, -1000.0)
    body[row**2 + (np.abs(column) - 0.35) ** 2 < 0.07] = -850
    noise = gaussian_filter(rng.normal(size=(num_slices, *SLICE_SHAPE)), sigma=0.7, axes=(1, 2))
    return list((body + 25 / noise.std() * noise).clip(*STORED_HU_RANGE).astype(np.int16))


def ct_table(codecs: list[Codec], scans: dict[str, dict[str, Figures]]) -> Table:
    """Lay out the figures of CT slices."""
    table = Table(title=", ".join(f"{k}: {name}" for k, name in enumerate(scans, 1)))
    table.add_column("", no_wrap=True)
    for k in range(1, len(scans) + 1):
        for heading in ("KiB", "of float16", "decoded/s", "encode ms"):
            table.add_column(f"{k}: {heading}", justify="right", no_wrap=True)
    table.add_column("lossless", no_wrap=True)
    for codec in codecs:
        if not codec.skipped:
            rows = [figures[codec.name] for figures in scans.values()]
            shares = [
                f.size / figures[REFERENCE].size for f, figures in zip(rows, scans.values(), strict=True)
            ]
            cells = [
                (f"{f.size / 1024:.0f}", f"{share:.1%}", f"{1 / f.decode_s:,.0f}", f"{1000 * f.encode_s:.1f}")
                for f, share in zip(rows, shares, strict=True)
            ]
            table.add_row(codec.name, *sum(cells, ()), yes_or_no(all(f.lossless for f in rows)))
    return table


def mask_table(figures: dict[str, Figures]) -> Table:
    """Lay out the figures of masks."""
    table = Table("", "bytes", "decode µs", "encode µs", "lossless", title="label maps of 128 x 128")
    for name, f in figures.items():
        times = f"{1e6 * f.decode_s:.0f}", f"{1e6 * f.encode_s:.0f}"
        table.add_row(name, f"{f.size:.0f}", *times, yes_or_no(f.lossless))
    return table


def yes_or_no(answer: bool) -> str:
    """Return a cell of a table."""
    return "yes" if answer else "NO"


def default_folder() -> Path | None:
    """Return the folder of real CT that the tests use, if it is there."""
    stated = os.environ.get("DALE_CT_TEST_DATA")
    folder = Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def main(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of CTs in NIfTI, and of label maps. Default: DALE_CT_TEST_DATA, or ../shared/data "
            "beside the repository; without either a synthetic slice."
        ),
    ] = None,
    slices: Annotated[int, typer.Option(help="Slices of a scan, spread over it.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Times everything is measured; medians are shown.", min=1)] = 5,
) -> None:
    """Compare codecs of CT slices by bytes and CPU time; the last line is JSON.

    Its ratios are float16 npy's figure over ours: of the time to decode, below 1 because reading a npy is a
    copy, and of the bytes.
    """
    folder = folder or default_folder()
    console = Console(width=160)
    scans, masks = read_scans(folder, slices) if folder else ({}, [])
    if not scans:
        console.print("No CT with slices of 512 x 512: the slices are SYNTHETIC, a body under noise.")
        scans = {"synthetic": synthetic_scan(slices)}
    codecs = ct_codecs()
    figures = {name: measure(codecs, scan, repeats, name) for name, scan in scans.items()}
    console.print(ct_table(codecs, figures))
    for codec in codecs:
        if codec.skipped:
            console.print(f"{codec.name} is left out: {codec.skipped}.")
    if masks:
        console.print(mask_table(measure(mask_codecs(), masks, repeats, "masks")))
    typer.echo(json.dumps(result(figures)))


def result(scans: dict[str, dict[str, Figures]]) -> dict[str, object]:
    """Sum up ours beside the reference, every scan counting the same."""
    ours, reference = ([figures[name] for figures in scans.values()] for name in (OURS, REFERENCE))
    sizes, seconds = (
        [np.mean([getattr(f, field) for f in rows]) for rows in (reference, ours)]
        for field in ("size", "decode_s")
    )
    return {
        "name": "slice_codecs",
        "synthetic": "synthetic" in scans,
        "time_ratio": round(seconds[0] / seconds[1], 3),
        "size_ratio": round(sizes[0] / sizes[1], 3),
        "percent_of_float16_npy": round(100 * sizes[1] / sizes[0], 1),
        "slices_per_s_per_core": round(1 / seconds[1]),
        "max_rel_error": 0 if all(f.lossless for f in ours) else 1,
    }


if __name__ == "__main__":
    typer.run(main)
