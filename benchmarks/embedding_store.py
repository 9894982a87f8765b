"""The embedding store beside other ways to keep a cohort's embeddings: size, files, write, load, reads.

    python benchmarks/embedding_store.py

All formats hold the same random float16 embeddings and are written and read in turns in one process on one
thread; medians of wall time. What is read is in the page cache: the format is measured, not the disk. Of ours
that has a checksum and a search for NaN and Inf, and writing waits for the disk. Ends in one line of JSON.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import blosc2
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.embeddings.store import EmbeddingStore, EmbeddingStoreWriter

IDENTITY = {
    "encoder": "benchmark",
    "encoder_id": "random",
    "preprocessing": "none",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}
Volumes = dict[str, np.ndarray]


class Format(NamedTuple):
    """One way to keep embeddings.

    Args:
        name: shown in the table.
        write: embeddings into a folder.
        load: all volumes in the order asked for, one packed array.
        read: one volume after the other, in another order.
        good: what it also has: memory-mapped, checked on reading, opened without running code.
    """

    name: str
    write: Callable[[Path, Volumes], None]
    load: Callable[[Path, list[str]], np.ndarray]
    read: Callable[[Path, list[str]], int]
    good: str


def packed(arrays: list[np.ndarray]) -> np.ndarray:
    """Join the volumes into one array, as a probe needs them."""
    return np.concatenate(arrays)


def write_store(folder: Path, volumes: Volumes) -> None:
    """Write ours."""
    with EmbeddingStoreWriter(folder, IDENTITY, "float16") as writer:
        for name, tokens in volumes.items():
            writer.add(name, torch.from_numpy(tokens), (0.7, 0.7, 1.0), z_mm=torch.arange(len(tokens)))


def read_store(folder: Path, names: list[str]) -> int:
    """Read ours, volume by volume."""
    store = EmbeddingStore(folder)
    return sum(len(store.read(name).tokens) for name in names)


def write_files(folder: Path, volumes: Volumes) -> None:
    """Write one safetensors file a volume."""
    for name, tokens in volumes.items():
        z_mm = torch.arange(len(tokens), dtype=torch.float32)
        save_file({"cls": torch.from_numpy(tokens), "z_mm": z_mm}, folder / f"{name}.safetensors")


def read_file(folder: Path, name: str) -> np.ndarray:
    """Read one safetensors file."""
    tokens: np.ndarray = load_file(folder / f"{name}.safetensors")["cls"].numpy()
    return tokens


def write_npy(folder: Path, volumes: Volumes) -> None:
    """Write one array file a volume."""
    for name, tokens in volumes.items():
        np.save(folder / f"{name}.npy", tokens)


def write_blosc2(folder: Path, volumes: Volumes) -> None:
    """Write one compressed file a volume, lossless, as shards compress slices."""
    parameters = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1)
    for name, tokens in volumes.items():
        blosc2.asarray(
            tokens.view(np.int16), urlpath=str(folder / f"{name}.b2nd"), cparams=parameters, mode="w"
        )


def read_blosc2(folder: Path, name: str) -> np.ndarray:
    """Read one compressed file."""
    tokens: np.ndarray = blosc2.open(str(folder / f"{name}.b2nd"), mode="r")[:]
    return tokens.view(np.float16)


def write_hdf5(folder: Path, volumes: Volumes) -> None:
    """Write one HDF5 file with a dataset a volume, checksummed."""
    import h5py

    with h5py.File(folder / "all.h5", "w") as file:
        for name, tokens in volumes.items():
            file.create_dataset(name, data=tokens, chunks=tokens.shape, fletcher32=True)


def read_hdf5(folder: Path, names: list[str]) -> list[np.ndarray]:
    """Read datasets of the HDF5 file."""
    import h5py

    with h5py.File(folder / "all.h5") as file:
        return [file[name][:] for name in names]


def write_parquet(folder: Path, volumes: Volumes) -> None:
    """Write one Parquet file: a row a volume, its tokens as bytes, uncompressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"volume": list(volumes), "tokens": [tokens.tobytes() for tokens in volumes.values()]})
    pq.write_table(
        table,
        folder / "all.parquet",
        row_group_size=100,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )


def read_parquet(folder: Path, names: list[str], dim: int) -> list[np.ndarray]:
    """Read rows of the Parquet file."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "all.parquet", page_checksum_verification=True)
    row_of = {name: row for row, name in enumerate(table["volume"].to_pylist())}
    tokens = table["tokens"]
    return [np.frombuffer(tokens[row_of[name]].as_buffer(), np.float16).reshape(-1, dim) for name in names]


def formats(dim: int) -> list[Format]:
    """Rows of the table; ours first. HDF5 and Parquet need h5py and pyarrow."""

    def of_files(read: Callable[[Path, str], np.ndarray]) -> tuple[Any, Any]:
        return (
            lambda folder, names: packed([read(folder, name) for name in names]),
            lambda folder, names: sum(len(read(folder, name)) for name in names),
        )

    def of_one(read: Callable[[Path, list[str]], list[np.ndarray]]) -> tuple[Any, Any]:
        return (
            lambda folder, names: packed(read(folder, names)),
            lambda folder, names: sum(len(read(folder, [name])[0]) for name in names),
        )

    rows = [
        Format(
            "EmbeddingStore (safetensors parts)",
            write_store,
            lambda folder, names: packed([*map(torch.Tensor.numpy, map(EmbeddingStore(folder).view, names))]),
            read_store,
            "mapped, checked, no code",
        ),
        Format("a safetensors file a volume", write_files, *of_files(read_file), "mapped, no code"),
        Format(
            "an npy file a volume",
            write_npy,
            *of_files(lambda folder, name: np.load(folder / f"{name}.npy")),
            "mapped, no code",
        ),
        Format("a blosc2 file a volume", write_blosc2, *of_files(read_blosc2), "no code"),
    ]
    try:
        import h5py  # noqa: F401 (is it there?)
    except ImportError:
        pass
    else:
        rows.append(Format("one HDF5 file", write_hdf5, *of_one(read_hdf5), "checked, no code"))
    try:
        import pyarrow  # noqa: F401 (is it there?)
    except ImportError:
        return rows
    load, _ = of_one(lambda folder, names: read_parquet(folder, names, dim))
    read = lambda folder, names: sum(map(len, read_parquet(folder, names, dim)))  # noqa: E731
    return [*rows, Format("one Parquet file", write_parquet, load, read, "checked, no code")]


def timed(action: Callable[[], object]) -> float:
    """Wall seconds of an action."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main(
    volumes: Annotated[int, typer.Option(help="Volumes of the cohort.")] = 400,
    dim: Annotated[int, typer.Option(help="Width of an embedding.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Turns.")] = 3,
) -> None:
    """Compare the formats and print a table and a line of JSON."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    cohort = {
        f"train_{number}_a_1": rng.standard_normal((int(rng.integers(90, 500)), dim), np.float32).astype(
            np.float16
        )
        for number in range(volumes)
    }
    expected, names = packed(list(cohort.values())), list(cohort)
    shuffled = [names[place] for place in rng.permutation(volumes)]
    rows = formats(dim)
    seconds: dict[str, dict[str, list[float]]] = {
        row.name: {"write": [], "load": [], "read": []} for row in rows
    }
    sizes, files = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for row in track([row for _ in range(repeats) for row in rows], description="Timing"):
            folder = Path(root, "embeddings")
            folder.mkdir()
            times = seconds[row.name]
            times["write"].append(timed(partial(row.write, folder, cohort)))
            assert np.array_equal(row.load(folder, names), expected)
            times["load"].append(timed(partial(row.load, folder, names)))
            times["read"].append(timed(partial(row.read, folder, shuffled)))
            sizes[row.name] = sum(path.stat().st_size for path in folder.iterdir()) / expected.nbytes
            files[row.name] = len(list(folder.iterdir()))
            shutil.rmtree(folder)
    table = Table("format", "files", "bytes", "write GB/s", "load GB/s", "read a volume, ms", "has")
    medians = {
        name: {what: float(np.median(of)) for what, of in times.items()} for name, times in seconds.items()
    }
    for row in rows:
        own = medians[row.name]
        speeds = [f"{expected.nbytes / own[what] / 1e9:.2f}" for what in ("write", "load")]
        per_volume = f"{1000 * own['read'] / volumes:.3f}"
        table.add_row(row.name, str(files[row.name]), f"{sizes[row.name]:.3f}", *speeds, per_volume, row.good)
    Console(width=110).print(table)
    ours, reference = medians[rows[0].name], medians[rows[1].name]
    result = {
        "name": "embedding_store",
        "time_ratio": reference["load"] / ours["load"],
        "max_rel_error": 0.0,
        "files": files,
        "seconds": medians,
        "bytes": expected.nbytes,
    }
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
