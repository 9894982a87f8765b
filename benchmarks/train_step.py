"""One training step of DALE-CT-2S: our engine's parts against the same network in eager autocast.

On a GPU: ViT-L/16, views of 256 and 144 px, 64 slabs, and how much of the device's peak goes into the
network. On a CPU, where that says nothing, a small network shows that nothing breaks the compiled graph and
that both ways agree; then the training of `make demo`, from shards to the optimizer, against the plain way,
in turns, and what the network's matrix products alone take. Run that on free cores: it is timed on the clock.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, cast
from unittest.mock import patch

import ignite.engine
import timm
import torch
import typer
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from benchmarks.loader import processor_seconds
from common.cohort.cohort import pos_weights
from common.engines import pretraining_trainer
from common.losses.auxiliary import TERMS, AuxiliaryBCELoss
from common.losses.lejepa import LeJEPALoss, SIGReg
from common.networks import pretraining_model
from common.networks.pretraining_model import (
    AuxiliaryHead,
    PretrainingModel,
    ProjectionHead,
    clip_by_global_norm,
    distribute,
    peak_bf16_flops,
    training_flops,
)
from common.optimizers.adamw import adamw
from common.transforms import render_views, soft_labels
from common.transforms.multi_crop import nearest_cells
from study.run import amp_dtype

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = "bundles/dale_ct_2s"
NOT_TIMED = 10  # steps that compile, warm up and use what a worker read ahead
VIT_L: dict[str, Any] = {"patch_size": 16, "img_size": 512, "embed_dim": 1024, "depth": 24, "num_heads": 16}
SMALL: dict[str, Any] = {"patch_size": 16, "img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}


def new_network(size: dict[str, Any], device: torch.device, compiled: bool) -> PretrainingModel:
    """Build encoder, projector and read-outs with the same weights each time."""
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_large_patch14_dinov2", in_chans=1, num_classes=0, dynamic_img_size=True, init_values=1e-5, **size
    )
    width = size["embed_dim"]
    head = AuxiliaryHead(width, 118, 14, train_auxiliary_head=True, prior_logits=None)
    network = PretrainingModel(encoder, ProjectionHead(width, 2048, 124), head, checkpoint_activations=False)
    blocks = cast("nn.ModuleList", encoder.get_submodule("blocks"))
    distribute(network=network, blocks=blocks, sharding="ddp", compiled=compiled, device=device)
    return network


class Step:
    """Everything of an iteration behind the data: forward, Eq. 3, backward, clip, AdamW."""

    def __init__(
        self, network: PretrainingModel, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.network, self.optimizer, self.device = network, optimizer, device
        self.lejepa = LeJEPALoss(SIGReg(1024, num_knots=17, t_max=3.0, compiled=False), 0.02)
        self.auxiliary = AuxiliaryBCELoss(
            ts_pos_weight=pos_weights("totalsegmentator"),
            rex_pos_weight=pos_weights("rexgroundingct"),
            auxiliary_terms=TERMS,
            aux_weight=0.1,
            rex_targets="presence",
        ).to(device)

    def __call__(self, batch: dict, number: int) -> torch.Tensor:
        """Train one step; return the loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.network(batch["global"], batch["local"])
        terms = self.lejepa(output["projections"].float(), num_global=2, step=number)
        auxiliary = self.auxiliary(
            output["logits"], batch["targets"], batch["everywhere"], batch["everywhere"]
        )
        loss = terms["loss"] + 0.1 * auxiliary["loss"]
        loss.backward()
        clip_by_global_norm(self.network, 3.0)
        self.optimizer.step()
        return loss.detach()


def new_batch(batch_size: int, sizes: tuple[int, int], patch_px: int, device: torch.device) -> dict:
    """Random views and targets; a step's time does not depend on what they show."""
    generator = torch.Generator().manual_seed(1)
    batch: dict = {"everywhere": torch.ones(batch_size, dtype=torch.bool, device=device), "targets": {}}
    for group, views, side in (("global", 2, sizes[0]), ("local", 8, sizes[1])):
        batch[group] = torch.randn(batch_size, views, 1, side, side, generator=generator).to(device)
        patches = (side // patch_px) ** 2
        batch["targets"][group] = {
            f"{source}_{level}": torch.rand(*shape, classes, generator=generator).to(device)
            for source, classes in (("ts", 118), ("rex", 14))
            for level, shape in (("cls", (batch_size, views)), ("patch", (batch_size, views, patches)))
        }
    return batch


def seconds(step: Step, batch: dict, repeats: int) -> tuple[float, list[float]]:
    """Median time of a step, and the losses, after two steps that compile and warm up."""
    losses, times = [step(batch, number) for number in (1, 2)], []
    for number in range(3, 3 + repeats):
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step(batch, number))
        if step.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), [float(loss) for loss in losses]


def gemm_flops(device: torch.device, repeats: int = 20) -> float:
    """Operations a second of the network's largest product, in bfloat16: what the device does in practice."""
    tokens, width, hidden = (65536, 1024, 4096) if device.type == "cuda" else (512, 192, 768)
    left = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    right = torch.randn(width, hidden, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * tokens * width * hidden / statistics.median(times)


def counted_flops(encoder: nn.Module, sizes: tuple[int, int], device: torch.device) -> int:
    """What torch itself counts in the forward passes of one slab's views, times three."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for views, side in zip((2, 8), sizes, strict=True):
            encoder(torch.zeros(views, 1, side, side, device=device))
    return 3 * counter.get_total_flops()


def demo_shards(folder: Path) -> Path:
    """Draw and prepare a few volumes as demo/run.sh does its many."""
    cohort, shards = folder / "cohort", folder / "shards"
    rex = cohort / "rexgroundingct"
    drawn = ("--volumes", 24, "--seed", 1, "--matrix", 192, "--spacing-mm", 4, 6, "--rex-share", 1)
    masks = ("--rexgroundingct", rex / "dataset.json", "--rexgroundingct-masks", rex / "segmentations")
    for words in (
        ("phantom", "--out", cohort, *drawn),
        ("ct-rate", "--root", cohort, "--split", "train", "--out", shards, *masks),
    ):
        command = [sys.executable, "-m", "data_prep", *map(str, words)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return shards


def every_cell(boxes: torch.Tensor, flips: torch.Tensor, shapes: torch.Tensor, **sizes: int) -> Any:  # noqa: ANN401
    """Do what ``patch_cells`` did: look at every mask cell of a patch, however small cells are."""
    axes: list[torch.Tensor] = []
    for axis in (0, 1):
        cells = nearest_cells(
            boxes[:, 1 + axis], boxes[:, 3], sizes["size_px"], shapes[:, axis], sizes["grid"]
        )
        patches = torch.where(flips[:, None] & (axis == 1), cells.flip(1), cells)
        patches = patches.unflatten(1, (-1, sizes["patch_size_px"]))
        touched = patches.amin(2, keepdim=True) + torch.arange(sizes["most_cells"])
        pixels = (patches[..., None, :] == touched[..., None]).sum(-1).float()
        axes += [touched.clamp_(max=sizes["grid"] - 1), pixels]
    rows, row_pixels, columns, column_pixels = axes
    return soft_labels.PatchCells(rows, row_pixels, columns, column_pixels, sizes["patch_size_px"])


def every_bit(planes: torch.Tensor, plane: torch.Tensor, cells: Any, num_classes: int) -> torch.Tensor:  # noqa: ANN401
    """Do what counting findings did: look at every patch of a plane that is not empty."""
    shown = planes.flatten(1).any(1)[plane]
    rows, row_pixels, columns, column_pixels = (part[shown] for part in cells[:4])
    views = soft_labels.PatchCells(rows, row_pixels, columns, column_pixels, cells.patch_size_px)
    bits, pixels = soft_labels._cells_of_patches(planes, plane[shown], views)
    counts = torch.zeros(len(plane), bits.shape[1], num_classes)
    for k in range(num_classes):
        if bool((planes >> k & 1).any()):
            counts[shown, :, k] = (((bits >> k) & 1) * pixels).sum(2)
    return counts


PLAIN = (
    (pretraining_model, "_use_plain_products", lambda network, device: None),
    (pretraining_trainer, "_keep_freed_memory", lambda: None),
    (render_views, "patch_cells", every_cell),
    (soft_labels, "_counts_of_what_is_shown", every_bit),
)
"""What the plain way does instead: fused attention, a convolution, memory given back, every cell counted."""


def train_demo(shards: Path, steps: int, plain: bool, dtype: str) -> dict[str, Any]:
    """Train the first steps of `make demo`; views a second, processor time a step, and the losses."""
    config = ConfigParser()
    config.read_config([str(ROOT / BUNDLE / "configs" / "train.json"), str(ROOT / "demo" / "train.json")])
    own = {"dataset_dir": str(shards), "output_dir": str(shards.parent / "run"), "max_steps": steps}
    own |= {"bundle_root": str(ROOT / BUNDLE), "warmup_steps": 1, "amp_dtype": dtype}
    config.update(own | {"train::handlers": []} | ({"compiled": False} if plain else {}))
    set_determinism(seed=config.get_parsed_content("seed"))
    marks, losses = [], []

    def note(engine: ignite.engine.Engine) -> None:
        if engine.state.iteration in (NOT_TIMED, steps):
            marks.append((time.perf_counter(), processor_seconds()))
        output: Any = engine.state.output
        losses.append(float(output[0]["loss"]))

    with ExitStack() as stack:
        if plain:
            for where, name, before in PLAIN:
                stack.enter_context(patch.object(where, name, before))
        trainer = config.get_parsed_content("train::trainer")
        trainer.add_event_handler(ignite.engine.Events.ITERATION_COMPLETED, note)
        trainer.run()
    views = config["batch_size"] * (config["num_global"] + config["num_local"])
    clock_s, cpu_s = ((last - first) / (steps - NOT_TIMED) for first, last in zip(*marks, strict=True))
    return {
        "views_per_s": views / clock_s,
        "cpu_ms": 1e3 * cpu_s,
        "losses": losses,
        "products_ms": products_ms(trainer.network.encoder, config, getattr(torch, dtype)),
    }


def products_ms(encoder: nn.Module, config: ConfigParser, dtype: torch.dtype) -> float:
    """Processor time of the products of a step's linear layers alone, forward and backward."""
    products = []
    for views, size_px in (("num_global", "global_size_px"), ("num_local", "local_size_px")):
        tokens = (config[size_px] // config["patch_size_px"]) ** 2 + 1
        rows = config["batch_size"] * config[views] * tokens
        for module in encoder.get_submodule("blocks").modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.detach().to(dtype)
                products.append([torch.randn(rows, side).to(dtype) for side in weight.shape] + [weight])
    times = []
    for _ in range(20):
        start = time.process_time()
        for output, rows, weight in products:
            rows @ weight.T, output @ weight, output.T @ rows
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def demo_on_cpu(repeats: int) -> dict[str, float]:
    """Train the demo the plain way and ours, in turns; print a table and return what it says."""
    dtype, cores = amp_dtype(), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        shards = demo_shards(Path(folder))
        own: dict[str, Any] = {"max_workers": 1, "mp_context": get_context("spawn"), "max_tasks_per_child": 1}
        with ProcessPoolExecutor(**own) as alone:  # what one says of memory holds for its process
            ways = [(NOT_TIMED + 1, "float32")] + [(NOT_TIMED + 30, dtype)] * repeats
            tasks = [(shards, steps, plain, dtype) for steps, dtype in ways for plain in (True, False)]
            results = list(alone.map(train_demo, *zip(*tasks, strict=True)))
        exact = [result["losses"] for result in results[:2]]
        runs = {True: results[2::2], False: results[3::2]}
    table = Table(title=f"make demo in {dtype}, {cores} cores, median of {repeats}")
    for column in ("", "plain", "ours", "ratio"):
        table.add_column(column, justify="right")
    line: dict[str, float] = {}
    for name, better in (("views_per_s", 1), ("cpu_ms", -1), ("products_ms", -1)):
        plain, ours = (statistics.median(run[name] for run in runs[which]) for which in (True, False))
        ratios = [(our[name] / their[name]) ** better for their, our in zip(*runs.values(), strict=True)]
        line |= {f"demo_{name}": ours, f"demo_{name}_ratio": statistics.median(ratios)}
        table.add_row(name, f"{plain:.1f}", f"{ours:.1f}", f"{min(ratios):.2f}-{max(ratios):.2f}")
    Console(stderr=True).print(table)
    return line | {"demo_max_rel_error_float32": max(abs(b / a - 1) for a, b in zip(*exact, strict=True))}


def main(
    batch_size: Annotated[int, typer.Option(help="Slabs a step. Default: 64 on a GPU, 4 on a CPU.")] = 0,
    repeats: Annotated[int, typer.Option(help="Steps timed; the median counts.", min=3)] = 10,
) -> None:
    """Time a training step compiled and in eager autocast; check FLOP count, graph breaks and agreement.

    Example: python benchmarks/train_step.py
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    size, sizes = (VIT_L, (256, 144)) if on_gpu else (SMALL, (64, 32))
    batch_size = batch_size or (64 if on_gpu else 4)
    batch = new_batch(batch_size, sizes, size["patch_size"], device)
    results, memory = {}, {}
    for name, compiled in (("eager autocast", False), ("ours", True)):
        network = new_network(size, device, compiled)
        plain = torch.optim.AdamW(network.parameters(), lr=1e-5, weight_decay=0.04)
        step = Step(network, adamw(network, 1e-5, 0.04) if compiled else plain, device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.utils.counters.clear()
        results[name] = seconds(step, batch, repeats)
        memory[name] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        flops = training_flops(network.encoder, dict(zip(sizes, (2, 8), strict=True)))
        error = abs(flops / counted_flops(network.encoder, sizes, device) - 1)
        del network, step, plain
    (eager_s, eager_losses), (ours_s, ours_losses) = results["eager autocast"], results["ours"]
    rate, peak, gemm = batch_size * flops / ours_s, peak_bf16_flops(device), gemm_flops(device)
    table = Table(title=f"{'ViT-L/16' if on_gpu else 'Small ViT, no GPU: not the claim'}, {batch_size} slabs")
    for column in ("", "eager autocast", "ours"):
        table.add_column(column, justify="right")
    table.add_row("s a step", f"{eager_s:.4f}", f"{ours_s:.4f}")
    table.add_row("slabs/s", f"{batch_size / eager_s:.1f}", f"{batch_size / ours_s:.1f}")
    table.add_row("TFLOP/s", f"{batch_size * flops / eager_s / 1e12:.3f}", f"{rate / 1e12:.3f}")
    if on_gpu:
        table.add_row("GiB", f"{memory['eager autocast']:.1f}", f"{memory['ours']:.1f}")
    Console(stderr=True).print(table)
    where = (
        torch.cuda.get_device_name() if on_gpu else f"{platform.processor() or platform.machine()}, no GPU"
    )
    # bfloat16 rounds to 3 digits, and a compiler may order sums otherwise
    losses_differ = max(abs(ours / eager - 1) for ours, eager in zip(ours_losses, eager_losses, strict=True))
    line = {"name": "train_step", "device": where, "torch": torch.__version__, "time_ratio": eager_s / ours_s}
    line |= {"max_rel_error": losses_differ, "graph_breaks": breaks, "flop_count_error": error}
    line |= {"slabs_per_s": batch_size / ours_s, "share_of_measured_gemm": rate / gemm}
    if on_gpu:
        line |= {"mfu": rate / peak if peak else None, "memory_gib": memory["ours"]}
        line |= {"memory_ratio": memory["eager autocast"] / memory["ours"]}
    else:
        line |= demo_on_cpu(3)
    typer.echo(
        json.dumps(
            {key: round(value, 6) if isinstance(value, float) else value for key, value in line.items()}
        )
    )


if __name__ == "__main__":
    typer.run(main)
