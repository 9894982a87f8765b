"""Fine-tuning by LoRA, from NIfTI to the optimizer's step: ours against a plain PEFT loop over a DataLoader.

The plain loop is what the libraries' examples come to: nibabel, one interpolate a volume, all slices of a
volume through the encoder at once. It runs in float32, and once more in bfloat16. Each way runs in a process
of its own, in turns, so that its peak memory is its own.
"""

import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # of the repository, where this may run from
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["qkv"]}
WAYS = ("plain", "plain in bfloat16", "ours")
SIDE, WINDOW = 128, (-997.0, 888.0, -142.39, 360.97)
BATCH, STEPS = 2, 2
Parts = tuple[torch.nn.Module, Any]  # encoder and probe


class Plain(Dataset):
    """Volumes as a notebook would read them."""

    def __init__(self, paths: list[Path], labels: torch.Tensor) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        low, high, mean, std = WINDOW
        hu = nib.nifti1.Nifti1Image.from_filename(self.paths[index]).get_fdata(
            dtype=np.float32
        )  # (X, Y, Z), pointing left, back, up
        images = torch.from_numpy(hu).permute(2, 1, 0)[:, None]
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return (images.clamp(low, high) - mean) / std, self.labels[index]


def new_parts(seed: int = 0) -> Parts:
    """Return a small encoder with LoRA and a probe, the same each time."""
    import timm

    from common.networks.finetuned import let_learn
    from common.networks.mil_probe import initial_probe

    torch.manual_seed(seed)
    size: dict[str, Any] = {"patch_size": 16, "img_size": SIDE, "embed_dim": 192, "depth": 6, "num_heads": 3}
    encoder = timm.create_model(
        "vit_large_patch14_dinov2", in_chans=1, num_classes=0, dynamic_img_size=True, init_values=0.1, **size
    )
    let_learn(encoder, "lora", 0, LORA)
    return encoder, initial_probe("learned_attention", 192, 18, 0)


def plain_losses(parts: Parts, paths: list[Path], labels: torch.Tensor, is_bf16: bool) -> list[float]:
    """Train a few steps with all slices of a volume at once."""
    encoder, probe = parts
    learning = [weight for part in (encoder, probe) for weight in part.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    losses = []
    loader = DataLoader(Plain(paths, labels), batch_size=None, num_workers=1)
    total = 0.0
    for number, (images, target) in enumerate(loader, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            tokens = encoder(images)
        logits = probe(tokens.float()[None], torch.ones(1, len(tokens), dtype=torch.bool))[0]
        loss = F.binary_cross_entropy_with_logits(logits, target) / BATCH
        loss.backward()
        total += loss.item()
        if number % BATCH == 0:
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            total = 0.0
    return losses


def our_losses(parts: Parts, paths: list[Path], labels: torch.Tensor) -> list[float]:
    """Train the same steps as the bundle does."""
    from common.embeddings.ct_bags import CTBags
    from common.embeddings.work import ct_sources
    from common.networks.finetuned import FineTunedProbe
    from common.networks.pretraining_model import distribute
    from common.transforms.hounsfield import HUWindow
    from common.transforms.slice_strategies import SliceStrategy

    network = FineTunedProbe(*parts, slices_per_chunk=32, amp_dtype="bfloat16")
    cpu = torch.device("cpu")
    distribute(network=network, blocks=torch.nn.ModuleList(), sharding="ddp", compiled=False, device=cpu)
    learning = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    bags = CTBags.__new__(CTBags)  # without a bundle's files
    bags.sources, bags.strategy = ct_sources(paths[0].parent)[0], SliceStrategy(f"raw_{SIDE}", 16)
    bags.window, bags.slice_axes = HUWindow(*WINDOW), "yx"
    bags.num_workers, bags.device = 1, torch.device("cpu")
    losses, total = [], 0.0
    for number, images in enumerate(bags.read(range(len(paths))), 1):
        loss = F.binary_cross_entropy_with_logits(network(images), labels[number - 1]) / BATCH
        loss.backward()
        total += loss.item()
        if number % BATCH == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            total = 0.0
    return losses


def write_cts(folder: Path, num_slices: int) -> None:
    """Write volumes of noise, axial and pointing to the left, the back and the head."""
    rng = np.random.default_rng(0)
    for number in range(BATCH * STEPS):
        small = rng.normal(-300, 300, (64, 64, num_slices)).astype(np.int16)
        hu = small.repeat(4, 0).repeat(4, 1)
        nib.save(nib.Nifti1Image(hu, np.diag([-0.8, -0.8, 1.0, 1.0])), folder / f"ct_{number}.nii.gz")


def processor_seconds() -> float:
    """Return what this process and its loaders have used."""
    used = (resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(of.ru_utime + of.ru_stime for of in used)


def measure(folder: Path, way: str) -> None:
    """Run one way in this process and print what it took."""
    torch.set_num_threads(1)
    paths = sorted(folder.glob("*.nii.gz"))
    labels = (torch.rand(len(paths), 18, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    parts = new_parts()
    if way == "ours":  # libraries load before the clock starts, as they have for the plain loop
        importlib.import_module("common.embeddings.ct_bags")
        importlib.import_module("common.networks.pretraining_model")
    before, began = processor_seconds(), time.perf_counter()
    losses = (
        our_losses(parts, paths, labels)
        if way == "ours"
        else plain_losses(parts, paths, labels, way != "plain")
    )
    seconds, cpu = time.perf_counter() - began, processor_seconds() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"losses": losses, "seconds": seconds, "cpu": cpu, "mib": peak}
    sys.stdout.write(json.dumps(found) + "\n")


def main(
    num_slices: Annotated[int, typer.Option(help="Slices of a volume.")] = 300,
    repeats: Annotated[int, typer.Option(help="Times that each way runs; the median counts.")] = 3,
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare; see the module."""
    if way and folder:
        measure(folder, way)
        return
    found: dict[str, list[dict]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        write_cts(Path(scratch), num_slices)
        for _ in range(repeats):
            for name in WAYS:
                command = [sys.executable, __file__, "--way", name, "--folder", scratch]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name].append(json.loads(printed.splitlines()[-1]))
    slices = num_slices * BATCH * STEPS
    table = Table("way", "slices/s of processor time", "slices/s", "peak MiB", "losses")
    middle = {
        n: {k: median(run[k] for run in runs) for k in ("seconds", "cpu", "mib")} for n, runs in found.items()
    }
    for name, of in middle.items():
        losses = ", ".join(f"{loss:.4f}" for loss in found[name][0]["losses"])
        numbers = (f"{slices / of['cpu']:.0f}", f"{slices / of['seconds']:.0f}", f"{of['mib']:.0f}")
        table.add_row(name, *numbers, losses)
    Console().print(table)
    ours, theirs = middle["ours"], middle["plain"]
    errors = [
        abs(a - b) / b for a, b in zip(found["ours"][0]["losses"], found["plain"][0]["losses"], strict=True)
    ]
    result = {
        "name": "finetune_step",
        "time_ratio": theirs["cpu"] / ours["cpu"],
        "time_ratio_bfloat16": middle["plain in bfloat16"]["cpu"] / ours["cpu"],
        "memory_ratio": theirs["mib"] / ours["mib"],
        "max_rel_error": max(errors),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
