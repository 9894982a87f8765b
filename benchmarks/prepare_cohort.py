"""Speed of ``data_prep ct-rate`` on a synthetic cohort, and proof that kill -9 changes not a byte of shards.

    python benchmarks/prepare_cohort.py --volumes 200 --matrix 512 --spacing-mm 1.5

The cohort is written twice: once unbroken with workers of its own, timed; once on a scheduler that worker
processes have joined, of which the command, a worker and a worker's nanny are killed at random, seeded
moments, the command being started again. Speed per core counts the CPU seconds of all processes. Ends in one
line of JSON.
"""

import csv
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import typer
from rich.console import Console

REPOSITORY = Path(__file__).resolve().parents[1]
VICTIMS = ("command", "worker", "nanny")
console = Console(stderr=True)


class Unbroken(NamedTuple):
    """What the unbroken run took.

    Args:
        seconds: from start to end, the start of Python included.
        cpu_seconds: of the command and its workers.
        peak_worker_mb: most memory that a worker held, as the command prints it.
    """

    seconds: float
    cpu_seconds: float
    peak_worker_mb: float


def main(
    volumes: Annotated[int, typer.Option(help="Synthetic volumes to prepare.", min=2)] = 12,
    cohort: Annotated[
        Path | None, typer.Option(help="A cohort that data_prep phantom made, in place of a new one.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to work. Default: a temporary folder.")] = None,
    workers: Annotated[int, typer.Option(help="Worker processes.", min=2)] = 2,
    seed: Annotated[int, typer.Option(help="Of the moments and the order of the kills.")] = 0,
    matrix: Annotated[int, typer.Option(help="Rows and columns of a slice.")] = 256,
    spacing_mm: Annotated[float, typer.Option(help="Slice distance of the synthetic volumes.")] = 5.0,
    slices_per_shard: Annotated[int, typer.Option(help="As of ct-rate.", min=1)] = 300,
) -> None:
    """Write a cohort unbroken and with kill -9 three times; compare speed and bytes."""
    with working_folder(folder) as work:
        if cohort is None:
            cohort = work / "cohort"
            make_cohort(cohort, volumes, matrix, spacing_mm)
        arguments = ["ct-rate", "--root", str(cohort), "--split", "train"]
        arguments += ["--slices-per-shard", str(slices_per_shard)]
        whole, broken = work / "unbroken", work / "broken"
        unbroken = run_unbroken([*arguments, "--out", str(whole), "--workers", str(workers)])
        with joined_cluster(workers) as (address, nannies):
            command = [*arguments, "--out", str(broken), "--scheduler", address]
            kills = run_with_kills(command, broken, nannies, len(manifest(whole)), random.Random(seed))
        expected, got = checksums(whole), checksums(broken)
        rows = manifest(whole)
        number, slices = len(rows), sum(int(row["num_slices"] or 0) for row in rows)
        num_bytes = sum(path.stat().st_size for path in whole.glob("*.tar"))
        typer.echo(
            json.dumps(
                {
                    "volumes": number,
                    "slices": slices,
                    "slice_px": matrix,
                    "workers": workers,
                    "volumes_per_min": round(number / unbroken.seconds * 60, 1),
                    "slices_per_s_and_core": round(slices / unbroken.cpu_seconds, 1),
                    "mb_per_volume": round(num_bytes / 1e6 / number, 2),
                    "peak_worker_mb": unbroken.peak_worker_mb,
                    "shards": len(list(whole.glob("*.tar"))),
                    "kills": kills,
                    "num_kills": len(kills),
                    "identical": expected == got and bool(expected),
                }
            )
        )
    if expected != got:
        raise typer.Exit(1)


@contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """Use a folder and leave what is in it, or make one that is gone at the end."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="prepare_cohort_") as made:
            yield Path(made)
        return
    for name in ("unbroken", "broken"):
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def data_prep(arguments: list[str]) -> subprocess.Popen:
    """Start ``python -m data_prep``."""
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def make_cohort(cohort: Path, volumes: int, matrix: int, spacing_mm: float) -> None:
    """Draw synthetic scans of the training split."""
    console.print(f"Drawing {volumes} synthetic volumes in {cohort} ...", soft_wrap=True)
    options = [
        "--matrix",
        str(matrix),
        "--spacing-mm",
        str(spacing_mm),
        str(spacing_mm),
        "--valid-share",
        "0",
    ]
    process = data_prep(["phantom", "--volumes", str(volumes), "--out", str(cohort), *options])
    process.communicate()
    if process.returncode:
        raise RuntimeError("the cohort could not be drawn")


def run_unbroken(arguments: list[str]) -> Unbroken:
    """Run the command and measure it with its workers, for which it waits."""
    console.print("Unbroken ...")
    start = time.monotonic()
    process = data_prep(arguments)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise RuntimeError(f"the unbroken run ended with {status}:\n{printed}")
    peak = re.search(r"peak memory of a worker, MB +│ +([\d,]+)", printed)
    if peak is None:
        raise RuntimeError(f"the unbroken run did not say how much memory it took:\n{printed}")
    return Unbroken(seconds, usage.ru_utime + usage.ru_stime, float(peak[1].replace(",", "")))


@contextmanager
def joined_cluster(workers: int) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """Start a scheduler and nannies, each with one worker; stop all that is left of them at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    address = f"tcp://127.0.0.1:{port}"
    started = [dask("scheduler", "--host", "127.0.0.1", "--port", port)]
    started += [dask("worker", address, "--host", "127.0.0.1", "--nthreads", "1") for _ in range(workers)]
    try:
        yield address, started[1:]
    finally:
        for process in started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def dask(*arguments: str) -> subprocess.Popen:
    """Start a command of Dask that finds data_prep."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("dask")), *arguments, "--no-dashboard"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def run_with_kills(
    arguments: list[str], out: Path, nannies: list[subprocess.Popen], total: int, rng: random.Random
) -> list[str]:
    """Run the command to its end, and on the way kill it, a worker and a nanny; return who died and when."""
    victims = rng.sample(VICTIMS, k=len(VICTIMS))
    moments = sorted(rng.sample(range(1, max(total * 9 // 10, len(victims) + 1)), k=len(victims)))
    process = data_prep(arguments)
    kills = []
    for victim, moment in zip(victims, moments, strict=True):
        while num_done(out) < moment and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            break  # it was quicker than we
        kills.append(f"{victim} after {num_done(out)} volumes")
        console.print(f"kill -9: {kills[-1]} ...")
        if victim == "command":
            process.kill()
            process.communicate()
            process = data_prep(arguments)
        elif victim == "worker":
            worker_of(nannies[0]).kill()
        else:
            nannies[-1].kill()
    process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run that was killed did not go on, it ended with {process.returncode}")
    return kills


def worker_of(nanny: subprocess.Popen) -> psutil.Process:
    """Find the process that a nanny looks after; its command line says that multiprocessing started it."""
    children = psutil.Process(nanny.pid).children(recursive=True)
    return next(child for child in children if "--multiprocessing-fork" in child.cmdline())


def num_done(out: Path) -> int:
    """Count volumes whose part is there; those of a finished shard count by its index."""
    done = 0
    listed = (  # os.walk, unlike rglob, takes it that folders of finished shards go while it looks
        Path(folder, name) for folder, _, names in os.walk(out) for name in names
    )
    for index in (path for path in listed if path.name.endswith(".index.npz")):
        try:
            with np.load(index, allow_pickle=False) as arrays:
                done += len(arrays["volume"])
        except (OSError, ValueError):  # gone or renamed since it was listed
            continue
    return done


def manifest(out: Path) -> list[dict[str, str]]:
    """Return the rows of a run's manifest, one a volume."""
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def checksums(out: Path) -> dict[str, str]:
    """Checksum of every file that a run leaves, wherever it lies."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    typer.run(main)
