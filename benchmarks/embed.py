"""Slices a second of an embedding run from shards beside the encoder alone, and memory by length of volume.

    python benchmarks/embed.py

The run is that of ``inference.json``: decode, body box, crop, resize, encoder, store. The encoder's own
ceiling is the same network on random images, in turns with the runs. On a GPU it is the ViT-L of DALE-CT-2S,
compiled, in bfloat16, by wall time. Without one it is a small ViT in float32, and slices are those a second
of processor time of all threads, so that a busy machine matters less: they show how little of the time goes
elsewhere on one core, and nothing about a GPU. Ends in one line of JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from monai.engines import SupervisedEvaluator
from monai.engines.utils import PrepareBatchExtraInput
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where this may run from
from common.embeddings.ct_batches import SliceBatches
from common.embeddings.store import EmbeddingStore
from common.embeddings.work import ct_sources, embedding_work, store_folders
from common.handlers.embedding_writer import EmbeddingWriter
from common.networks.encoder import SlicesInferer
from common.shards.writer import VolumeSlices, write_shard
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.slice_strategies import slice_strategies

IDENTITY = {
    "encoder": "benchmark",
    "encoder_id": "random",
    "slice_order": "feet_to_head",
    "token_kind": "slice",
}
SMALL: dict[str, Any] = {"embed_dim": 192, "depth": 6, "num_heads": 3}
GPU: dict[str, Any] = {"slices": 128, "amp_dtype": "bfloat16"}
CPU: dict[str, Any] = {"slices": 32, "amp_dtype": "float32"}


def write_cohort(folder: Path, num_volumes: int, num_slices: int) -> None:
    """Write shards of synthetic CT, 512 x 512, with noise as of a soft kernel."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:512, :512]
    body = ((rows - 270) / 150) ** 2 + ((columns - 250) / 210) ** 2 <= 1
    planes = [(np.where(body, 40, -1000) + rng.normal(0, 20, (512, 512))).astype(np.int16) for _ in range(8)]
    folder.mkdir(parents=True)
    for number in range(num_volumes):
        ct = np.stack([planes[(number + z) % 8] for z in range(num_slices)])
        shape = (512, 512, num_slices)
        volume = VolumeSlices(f"v{number:04d}", ct, None, None, (0.7, 0.7, 1.0), shape, "LPS", None, "train")
        write_shard(folder / f"train-{number:06d}.tar", [volume])


def encoder(device: torch.device) -> torch.nn.Module:
    """Build DALE-CT's ViT-L/16, or a small ViT without a GPU."""
    size: dict[str, Any] = {} if device.type == "cuda" else SMALL
    return (
        timm.create_model(
            "vit_large_patch14_dinov2",
            in_chans=1,
            num_classes=0,
            dynamic_img_size=True,
            img_size=512,
            patch_size=16,
            **size,
        )
        .to(device)
        .eval()
    )


def embed(
    shards: Path, out: Path, network: torch.nn.Module, inferer: SlicesInferer, num_workers: int
) -> None:
    """Embed all volumes of the shards, as inference.json does."""
    device = next(network.parameters()).device
    knobs = GPU if device.type == "cuda" else CPU
    sources, rejected = ct_sources(shards, split="train")
    strategies = slice_strategies(["cropped_256"], 16)
    folders = store_folders(out, ["cropped_256"])
    batches = SliceBatches(
        work=embedding_work(sources, folders),
        strategies=strategies,
        window=HU_WINDOWS["ct_rate"],
        slice_axes="yx",
        slices_per_batch=knobs["slices"],
        num_workers=num_workers,
        device=device,
        padded=inferer.compiled,
    )
    writer = EmbeddingWriter(
        folders=folders,
        output_dir=out,
        identity=IDENTITY,
        dtype="float16",
        batches=batches,
        num_volumes=len(sources),
        rejected=rejected,
        max_rejected=0,
    )
    SupervisedEvaluator(
        device=device,
        val_data_loader=batches,
        network=network,
        inferer=inferer,  # type: ignore[arg-type]  # called as one is
        prepare_batch=PrepareBatchExtraInput({"is_fixed": "is_fixed"}),
        val_handlers=[writer],
        decollate=False,
    ).run()


def clock(device: torch.device) -> float:
    """Return the time once a GPU has done what it was given; without one, the processor's."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def one_process(shards: Path, num_workers: int) -> None:
    """Embed a cohort and print the peak memory of this process, host and device, in MiB."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = encoder(device)
    inferer = SlicesInferer((GPU if device.type == "cuda" else CPU)["amp_dtype"], False, False)
    with tempfile.TemporaryDirectory() as out:
        embed(shards, Path(out), network, inferer, num_workers)
    status = Path("/proc/self/status").read_text()
    host = int(status.split("VmHWM:")[1].split()[0]) / 1024  # of this program, unlike getrusage's
    on_device = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0
    typer.echo(f"{host} {on_device}")


def peaks_mib(folder: Path, num_volumes: int, num_slices: int, num_workers: int) -> tuple[float, float]:
    """Peak memory of a process of its own that embeds volumes of one length."""
    write_cohort(folder, num_volumes, num_slices)
    command = [sys.executable, __file__, "--child", str(folder), "--num-workers", str(num_workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    host, on_device = map(float, done.stdout.split()[-2:])
    return host, on_device


def rates(shards: Path, root: Path, num_slices: int, num_workers: int, repeats: int) -> dict[str, Any]:
    """Slices a second of runs and of the encoder alone, in turns, and the cores that the runs keep busy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    knobs = GPU if device.type == "cuda" else CPU
    network = encoder(device)
    inferer = SlicesInferer(knobs["amp_dtype"], device.type == "cuda", False)
    images = torch.randn(knobs["slices"], 1, 256, 256, device=device)
    num_batches = num_slices // knobs["slices"]
    run_rates, alone_rates, cores = [], [], []
    for turn in range(repeats + 1):  # the first warms up
        started = clock(device)
        with torch.no_grad():
            for _ in range(num_batches):
                inferer(images, network)
        alone_rates.append(num_batches * knobs["slices"] / (clock(device) - started))
        started, wall, processor = clock(device), time.perf_counter(), time.process_time()
        embed(shards, root / str(turn), network, inferer, num_workers)
        run_rates.append(num_slices / (clock(device) - started))
        cores.append((time.process_time() - processor) / (time.perf_counter() - wall))
        assert int(EmbeddingStore(root / str(turn)).lengths.sum()) == num_slices
    run_rate, alone = (statistics.median(of[1:]) for of in (run_rates, alone_rates))
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one core",
        "encoder": "ViT-L/16, bfloat16, compiled"
        if device.type == "cuda"
        else f"small ViT, float32, {SMALL}",
        "slices_per_second": run_rate,
        "encoder_slices_per_second": alone,
        "share_of_encoder": run_rate / alone,
        "volumes_of_300_per_second": run_rate / 300,
        "cores": statistics.median(cores[1:]),
    }


def main(
    child: Annotated[Path | None, typer.Option(help="Of the script itself: embed this.", hidden=True)] = None,
    volumes: Annotated[int, typer.Option(help="Volumes of the timed runs.")] = 3,
    slices: Annotated[int, typer.Option(help="Slices of each.")] = 128,
    num_workers: Annotated[int, typer.Option(help="Threads that read.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed turns.")] = 3,
) -> None:
    """Measure and print a table and a line of JSON."""
    if child is not None:
        one_process(child, num_workers)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_cohort(root / "shards", volumes, slices)
        result = {"name": "embed"} | rates(root / "shards", root, volumes * slices, num_workers, repeats)
        short, long = (
            peaks_mib(root / f"of_{length}", 640 // length, length, num_workers) for length in (80, 640)
        )
    result |= {
        "peak_mib_80_slices": short[0],
        "peak_mib_640_slices": long[0],
        "device_peak_mib_80_slices": short[1],
        "device_peak_mib_640_slices": long[1],
        "time_ratio": result["share_of_encoder"],
    }
    table = Table("", "", title=f"{result['device']}: {result['encoder']}")
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}" if value < 10 else f"{value:.0f}")
    Console(width=100).print(table)
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
