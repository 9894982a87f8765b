"""What one volume takes, from NIfTI to a shard on disk, beside the plain way to do it.

    python benchmarks/prepare_volume.py                 # a synthetic CT of 512 x 512 x 300, half a minute
    python benchmarks/prepare_volume.py --slices 800    # the volume that memory is promised for
    python benchmarks/prepare_volume.py ct.nii.gz       # a scan of yours, in HU

Plain: nibabel's get_fdata, cast to float16, one npy a slice in a tar; also with get_fdata in float32, which
is leaner. All write the same CT in turns, each time in a fresh process that has written a tiny one. Times are
processor time, in medians; memory is the most that a process holds beyond what it held before, in volumes as
int16. The label map and the findings that memory is measured with too are synthetic. Ends in one line of
JSON; its ratios are plain over ours.
"""

# X Y Z stored axes, Z H W slices, rows, columns

import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import nibabel as nib
import numpy as np
import typer
from isal import igzip
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.ct.files import CTFile
from common.ct.geometry import STORED_HU_RANGE
from common.shards.codec import decode_ct
from common.shards.writer import write_shard
from data_prep.sources.rexgroundingct import Annotation
from data_prep.sources.source_volume import SourceVolume, read_volume

SIZE_PX, SPACING_MM = 512, (0.75, 0.75, 1.0)
CODES = ("1c", "2b", "2d")
PLAIN, LEANER, OURS, MASKED = "plain", "plain, float32", "ours", "ours, with masks"
RSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


class Cost(NamedTuple):
    """What writing a volume took.

    Args:
        read_s: processor time until the voxels are there.
        write_s: processor time to compress them and write them.
        peak_bytes: held at most, beyond what was held before.
        num_bytes: on disk.
    """

    read_s: float
    write_s: float
    peak_bytes: int
    num_bytes: int

    @property
    def total_s(self) -> float:
        """Processor time in all."""
        return self.read_s + self.write_s


class Inputs(NamedTuple):
    """The files of a volume.

    Args:
        ct: in HU.
        label_map: or None.
        findings: or None.
    """

    ct: Path
    label_map: Path | None = None
    findings: Path | None = None


def write_ours(inputs: Inputs, out: Path) -> Cost:
    """Write a volume as ``python -m data_prep`` does."""
    rex = None if inputs.findings is None else Annotation(inputs.findings, CODES)
    ct = CTFile("volume", inputs.ct, (inputs.ct,))
    source = SourceVolume("volume", "train", ct, "v2", ts=inputs.label_map, rex=rex)
    shard = out / ("train-000000.tar" if rex is None else "train-rex-000000.tar")
    return measured(lambda: read_volume(source), lambda volume: write_shard(shard, [volume]), shard)


def write_plain(inputs: Inputs, out: Path, dtype: type[np.floating] = np.float64) -> Cost:
    """Write a volume as one would without much thought."""

    def read() -> np.ndarray:
        image = nib.nifti1.Nifti1Image.from_filename(inputs.ct)
        return image.get_fdata(dtype=dtype).astype(np.float16)

    def write(image: np.ndarray) -> None:
        with tarfile.open(out / "plain.tar", "w") as tar:
            for z in range(image.shape[2]):
                buffer = io.BytesIO()
                np.save(buffer, image[:, :, z])
                member = tarfile.TarInfo(f"volume_{z:04d}.npy")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)

    return measured(read, write, out / "plain.tar")


def measured(read: Callable[[], Any], write: Callable[[Any], Any], written: Path) -> Cost:
    """Return what reading and writing a volume takes in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    volume = read()
    middle = time.process_time()
    write(volume)
    end = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Cost(middle - start, end - middle, peak * RSS_BYTES, written.stat().st_size)


def write_warm(write: Callable[..., Cost], inputs: Inputs, out: Path, *options: object) -> Cost:
    """Write a tiny volume, then the volume: what a process does once is no part of what a volume takes."""
    tiny = np.linspace(-1024, 1000, 16 * 16 * 4).astype(np.int16).reshape(16, 16, 4)
    write(Inputs(save_gzipped(tiny, out / "tiny.nii.gz")), out, *options)
    return write(inputs, out, *options)


def in_a_process(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 (the function's)
    """Call a function in a process of its own, whose memory is that of nothing else."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def save_gzipped(array: np.ndarray, path: Path) -> Path:
    """Save an array as NIfTI, stored as LPS; faster than nibabel, whose gzip would take most of the time."""
    header = nib.Nifti1Image(
        array[..., :1], np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1])
    ).header
    header.set_data_shape(array.shape)
    header["vox_offset"] = 352
    with igzip.open(path, "wb", compresslevel=2) as file:
        file.write(header.binaryblock + bytes(4))
        for plane in range(array.shape[-1]):
            file.write(array[..., plane].tobytes(order="F"))
    return path


def make_inputs(folder: Path, num_slices: int) -> Inputs:
    """Make a CT of a body with lungs under noise, a label map and findings, as (X, Y, Z)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1 : 1 : SIZE_PX * 1j, -1 : 1 : SIZE_PX * 1j]
    body = x**2 / 0.7 + y**2 / 0.4 < 1
    lungs = (np.abs(x) - 0.4) ** 2 / 0.07 + y**2 / 0.2 < 1
    clean = np.where(lungs, -850.0, np.where(body, 40.0, -1000.0))
    noise = rng.normal(0, 1, (16, SIZE_PX, SIZE_PX))
    noise = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)) * 14  # scanners blur their noise
    stored = np.empty((SIZE_PX, SIZE_PX, num_slices), np.int16, order="F")
    ids, findings = np.zeros(stored.shape, np.uint8, order="F"), []
    for z in range(num_slices):
        sheet = np.roll(noise[z % 16], (z // 16) * 37, axis=0)
        stored[..., z] = np.rint(clean + np.where(body, sheet, sheet / 2)).T
        ids[..., z] = np.where(lungs & body, 10 + z * 5 // num_slices, 0).T
        findings.append((np.hypot(x - 0.4, y) < 0.05) & (z % 10 == 0))
    masks = np.repeat(np.stack(findings, -1).transpose(1, 0, 2)[None].astype(np.uint8), len(CODES), axis=0)
    return Inputs(
        save_gzipped(stored, folder / "ct.nii.gz"),
        save_gzipped(ids, folder / "ids.nii.gz"),
        save_gzipped(masks, folder / "findings.nii.gz"),
    )


def largest_error(ct: Path, shard: Path) -> float:
    """Return the largest difference of the shard from nibabel's voxels, relative to the range of HU."""
    image = nib.as_closest_canonical(nib.load(ct))
    expected = np.asanyarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0)
    low, high = STORED_HU_RANGE
    error = 0.0
    with tarfile.open(shard) as tar:
        members = [member for member in tar if member.name.endswith(".ct.blosc2")]
        for member, exact in zip(members, expected, strict=True):
            decoded = decode_ct(tar.extractfile(member).read())  # type: ignore[union-attr]  # a regular file
            difference = np.abs(decoded - np.rint(exact.astype(np.float64)).clip(low, high))
            error = max(error, float(difference.max()) / (high - low))
    return error


def main(
    ct: Annotated[Path | None, typer.Argument(help="A CT in NIfTI, in HU. Default: a synthetic one.")] = None,
    slices: Annotated[int, typer.Option(help="Slices of the synthetic CT.", min=2)] = 300,
    repeats: Annotated[int, typer.Option(help="Times each way is measured.", min=1)] = 3,
) -> None:
    """Write one volume both ways; the last line is JSON."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        made = in_a_process(make_inputs, out, slices) if ct is None else Inputs(ct)
        alone = Inputs(made.ct)
        shape = nib.nifti1.Nifti1Image.from_filename(made.ct).shape
        ways = {PLAIN: (write_plain, np.float64), LEANER: (write_plain, np.float32), OURS: (write_ours,)}
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, (write, *options) in ways.items():
                costs[name].append(in_a_process(write_warm, write, alone, out, *options))
        error = in_a_process(largest_error, made.ct, out / "train-000000.tar")
        figures = {name: middle(own) for name, own in costs.items()}
        if ct is None:
            figures[MASKED] = in_a_process(write_warm, write_ours, made, out)
    report("synthetic" if ct is None else ct.name, shape, figures, error)


def report(name: str, shape: tuple[int, ...], figures: dict[str, Cost], error: float) -> None:
    """Print a table and the line of JSON."""
    volume_bytes = int(np.prod(shape)) * 2
    table = Table(title=f"{name}, {' x '.join(map(str, shape))}: processor time, memory, bytes")
    for column in ("", "read s", "write s", "slices/s", "peak / volume as int16", "MB on disk"):
        table.add_column(column, justify="right" if column else "left")
    for row, cost in figures.items():
        table.add_row(
            *(row, f"{cost.read_s:.2f}", f"{cost.write_s:.2f}", f"{shape[-1] / cost.total_s:.0f}"),
            *(f"{cost.peak_bytes / volume_bytes:.2f}", f"{cost.num_bytes / 1e6:.1f}"),
        )
    Console(width=120).print(table)
    plain, leaner, ours = (figures[name] for name in (PLAIN, LEANER, OURS))
    line = {
        "name": "prepare_volume",
        "volume": name,
        "slices": shape[-1],
        "cores": os.cpu_count(),
        "time_ratio": plain.total_s / ours.total_s,
        "time_ratio_float32": leaner.total_s / ours.total_s,
        "read_ratio": plain.read_s / ours.read_s,
        "memory_ratio": plain.peak_bytes / ours.peak_bytes,
        "max_rel_error": error,
        "peak_over_volume": ours.peak_bytes / volume_bytes,
        "seconds_per_volume": ours.total_s,
        "read_s": ours.read_s,
        "write_s": ours.write_s,
    }
    if MASKED in figures:
        line["peak_over_volume_with_masks"] = figures[MASKED].peak_bytes / volume_bytes
    rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
    typer.echo(json.dumps(rounded))


def middle(costs: list[Cost]) -> Cost:
    """Return the median of each figure."""
    read_s, write_s, peak, num_bytes = (statistics.median(values) for values in zip(*costs, strict=True))
    return Cost(read_s, write_s, int(peak), int(num_bytes))


if __name__ == "__main__":
    typer.run(main)
