"""How fast samples come from shards, how many cores feed one H200, and what hands them over costs.

    python benchmarks/loader.py

A worker reads a slab, draws its views, decodes the slices they use and hands over their crops; the reference
hands over whole slabs in float32 with masks of 64 bits, as DALE-CT's authors do, and cuts no crop. Processor
time of all processes while batches come, after the first ones; a busy machine matters less. Samples a second
on the clock scale with the workers as far as there are free cores. Also shows how a batch is spread over
a cohort, against a shuffle buffer of 100 slabs behind a stream of scans. Ends in one line of JSON.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from benchmarks.views import slab_views, write_cohort
from common.shards.shards import ShardSet
from common.shards.slab_dataset import SlabViews, StepBatches, StepLoader

H200_SAMPLES_PER_SECOND = 363  # of DALE-CT-2S, 2.18 TFLOP each, at 790 TFLOP/s


class Cost(NamedTuple):
    """What samples cost in steady state.

    Args:
        cpu_ms: processor time a sample, of all processes.
        per_second: samples a second on the clock.
        megabytes: handed over a sample.
        worker_mib: memory that a worker has to itself.
        batch_mib: of a batch.
    """

    cpu_ms: float
    per_second: float
    megabytes: float
    worker_mib: float
    batch_mib: float


class WholeSlabs(Dataset):
    """The reference: every slice of a slab in float32, organ ids in 64 bits, findings unpacked."""

    def __init__(self, slabs: SlabViews) -> None:
        self.slabs = slabs

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Return one slab."""
        volume, first, length = self.slabs.slab_of(place)
        slab = self.slabs.shards.read_slab(volume, first, length)
        hu = np.stack([slab.read_ct(z).astype(np.float32) for z in range(length)])
        ts, rex = slab.read_ts(), slab.read_rex()
        empty = np.zeros((length, 128, 128), np.uint16)
        bits = (empty if rex is None else rex)[:, None] >> np.arange(14, dtype=np.uint16)[:, None, None]
        return {
            "hu": torch.from_numpy(hu.clip(-997, 888)),
            "ts": torch.from_numpy((empty if ts is None else ts).astype(np.int64)),
            "rex": torch.from_numpy((bits & 1).astype(np.uint8)),
        }


def processor_seconds() -> float:
    """Return what this process and its workers have used."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children())]
    return sum(time.user + time.system for time in times)


def cost_of(batches: Iterator[dict], batch_size: int, warm_up: int, num_batches: int) -> Cost:
    """Take batches and measure those after the first."""
    for _ in islice(batches, warm_up):
        pass
    cpu, clock, handed_over = processor_seconds(), time.perf_counter(), 0
    for batch in islice(batches, num_batches):
        tensors = [part for part in batch.values() if isinstance(part, torch.Tensor)]
        handed_over += sum(part.nbytes for part in tensors)
        for part in tensors:
            part.clone()  # as copying to the device reads it
    seconds, cpu = time.perf_counter() - clock, processor_seconds() - cpu
    samples = batch_size * num_batches
    workers = [worker.memory_full_info().uss for worker in psutil.Process().children()]
    return Cost(
        cpu_ms=1e3 * cpu / samples,
        per_second=samples / seconds,
        megabytes=handed_over / samples / 1e6,
        worker_mib=max(workers, default=0) / 2**20,
        batch_mib=handed_over / num_batches / 2**20,
    )


def ours(slabs: SlabViews, batch_size: int, num_workers: int) -> Iterator[dict]:
    """Return batches of a run, as its trainer gets them."""
    batches = StepBatches(batch_size, rank=0, world_size=1)
    prefetch = 2 if num_workers else None
    return iter(StepLoader(slabs, batches, num_workers=num_workers, prefetch_factor=prefetch))


def whole_slabs(slabs: SlabViews, batch_size: int) -> Iterator[dict]:
    """Return batches of the reference, from one worker."""
    batches = StepBatches(batch_size, rank=0, world_size=1)
    return iter(DataLoader(WholeSlabs(slabs), batch_sampler=batches, num_workers=1, prefetch_factor=2))


def same(one: dict, other: dict) -> bool:
    """Whether two batches are equal."""
    tensors = [name for name, part in one.items() if isinstance(part, torch.Tensor)]
    return one.keys() == other.keys() and all(
        np.array_equal(one[name].numpy(), other[name].numpy(), equal_nan=one[name].is_floating_point())
        for name in tensors
    )


def scans_in_batches(num_scans: int, num_batches: int = 200) -> dict[str, list[Counter]]:
    """Count the slabs of each scan in batches of 64 slabs: of ours, and out of a shuffle buffer."""
    rng = np.random.default_rng(0)
    scans = [
        SimpleNamespace(
            volume=f"scan {number}",
            num_slices=int(rng.integers(180, 600)),
            spacing_mm=(0.7, 0.7, float(rng.choice([0.5, 0.75, 1.0, 1.5, 2.0]))),
            has_rex=number % 16 == 0,  # as in CT-RATE
            labels=None,
        )
        for number in range(num_scans)
    ]
    slabs = slab_views(cast(ShardSet, SimpleNamespace(volumes=scans)))
    drawn = [[slabs.slab_of(64 * step + i)[0] for i in range(64)] for step in range(num_batches)]
    num_slabs = np.bincount(slabs.slab_volumes)
    stream = (int(scan) for scan in rng.permutation(num_scans) for _ in range(num_slabs[scan]))
    buffer, buffered = list(islice(stream, 100)), []
    for scan in islice(stream, 64 * num_batches):
        place = int(rng.integers(100))
        buffered.append(buffer[place])
        buffer[place] = scan
    from_buffer = [buffered[first : first + 64] for first in range(0, len(buffered), 64)]
    return {"ours": list(map(Counter, drawn)), "buffer of 100 slabs": list(map(Counter, from_buffer))}


def show_spread(console: Console) -> int:
    """Print how batches are spread over cohorts; return the most slabs of one scan in a batch of ours."""
    table = Table(title="Scans in a batch of 64 slabs")
    for heading in ("scans in the cohort", "order", "scans in a batch, mean", "most slabs of one scan"):
        table.add_column(heading)
    most = []
    for num_scans in (500, 47_000):
        for name, batches in scans_in_batches(num_scans).items():
            largest = max(max(batch.values()) for batch in batches)
            most += [largest] if name == "ours" else []
            table.add_row(f"{num_scans:,}", name, f"{np.mean(list(map(len, batches))):.1f}", str(largest))
    console.print(table)
    return max(most)


def show(costs: dict[str, Cost], console: Console) -> None:
    """Print what was measured."""
    table = Table(title="Samples from shards")
    headings = ("", "CPU ms a sample", "samples/s", "MB a sample", "MB/s", "MiB a batch", "MiB a worker")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name, cost in costs.items():
        numbers = (cost.cpu_ms, cost.per_second, cost.megabytes, cost.per_second * cost.megabytes)
        table.add_row(name, *(f"{n:.3g}" for n in (*numbers, cost.batch_mib, cost.worker_mib)))
    console.print(table)


def main(
    batch_size: int = typer.Option(32, help="Samples of a batch."),
    num_batches: int = typer.Option(30, help="Batches that are measured."),
) -> None:
    """Measure loading in this process, and with 1 and 2 workers."""
    torch.set_num_threads(1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        shards, what = write_cohort(Path(folder))
        slabs = slab_views(shards)
        console.print(f"Shards of {what}. {os.cpu_count()} cores; torch {torch.__version__}.", markup=False)
        equal = all(map(same, islice(ours(slabs, 4, 0), 3), islice(ours(slabs, 4, 2), 3)))
        costs = {
            f"{workers or 'no'} worker{'s' * (workers != 1)}": cost_of(
                ours(slabs, batch_size, workers), batch_size, 2 * workers + 1, num_batches
            )
            for workers in (0, 1, 2)
        }
        few = max(batch_size // 8, 1)
        costs["whole slabs, 1 worker"] = cost_of(whole_slabs(slabs, few), few, 3, num_batches)
    show(costs, console)
    most_of_one_scan = show_spread(console)
    one, two = costs["1 worker"], costs["2 workers"]
    cores = H200_SAMPLES_PER_SECOND * two.cpu_ms / 1e3
    console.print(
        f"{H200_SAMPLES_PER_SECOND} samples/s, the most an H200 takes of DALE-CT-2S, need {cores:.1f} cores. "
        f"Two workers give {two.per_second / one.per_second:.2f} times the samples of one, "
        f"at {two.cpu_ms / one.cpu_ms:.2f} times the processor time a sample."
    )
    reference = costs["whole slabs, 1 worker"]
    line = {
        "name": "loader",
        "time_ratio": reference.cpu_ms / one.cpu_ms,
        "memory_ratio": reference.megabytes / one.megabytes,
        "max_rel_error": 0.0 if equal else float("inf"),
        "ms_per_sample": two.cpu_ms,
        "cores_per_h200": cores,
        "scaling": two.per_second / one.per_second,
        "scaling_cpu_ms": two.cpu_ms / one.cpu_ms,
        "most_of_one_scan": most_of_one_scan,
        "data": "real" if "real CT" in what.split(",")[0] else "synthetic",
    }
    typer.echo(json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    typer.run(main)
