"""One training step of dinov2_ct: batched views against a plain loop over them, and Sinkhorn-Knopp by itself.

The loop is DINO as it is commonly written: one forward pass a view, both heads on every patch, a mean over
pairs of views, Sinkhorn-Knopp that divides the matrix in place. Both train the same small network on a CPU,
or ViT-L/14 on a GPU, from the same weights, views and masks, and must find the same losses.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.losses.dino import SINKHORN_ITERATIONS, DINOLoss, IBOTLoss, sinkhorn_knopp
from common.networks.dino_model import DINOHead, DINOModel, follow, new_teacher
from common.networks.pretraining_model import clip_by_global_norm, distribute, peak_bf16_flops, training_flops
from common.optimizers.adamw import layerwise_adamw
from common.transforms.patch_masks import PatchMasks, masked_places

VIT_L: dict[str, Any] = {"patch_size": 14, "img_size": 518, "embed_dim": 1024, "depth": 24, "num_heads": 16}
SMALL: dict[str, Any] = {"patch_size": 14, "img_size": 112, "embed_dim": 96, "depth": 3, "num_heads": 3}
VIEWS = (2, 14)
TEMP, STUDENT_TEMP, MOMENTUM = 0.05, 0.1, 0.994


def blocks_of(encoder: torch.nn.Module) -> torch.nn.ModuleList:
    """Return the blocks of a ViT of timm."""
    return cast("torch.nn.ModuleList", encoder.get_submodule("blocks"))


class Networks:
    """Student, teacher, losses and optimizer, with the same weights each time."""

    def __init__(self, size: dict[str, Any], prototypes: int, device: torch.device, compiled: bool) -> None:
        torch.manual_seed(0)
        encoder = timm.create_model(
            "vit_large_patch14_reg4_dinov2", in_chans=1, num_classes=0, dynamic_img_size=True, **size
        )
        width, hidden = size["embed_dim"], 2048 if device.type == "cuda" else 256
        narrow = 256 if device.type == "cuda" else 64
        cls_head, patch_head = (DINOHead(width, hidden, narrow, prototypes) for _ in range(2))
        student = DINOModel(encoder, cls_head, patch_head, checkpoint_activations=False)
        teacher = new_teacher(student)
        how: dict[str, Any] = {"sharding": "ddp", "compiled": compiled, "device": device}
        self.teacher = distribute(network=teacher, blocks=blocks_of(teacher.get_submodule("encoder")), **how)
        self.student = distribute(network=student, blocks=blocks_of(encoder), **how)
        self.optimizer = layerwise_adamw(
            self.student,
            depth=size["depth"],
            lr=1e-5,
            weight_decay=0.04,
            layer_decay=1.0,
            patch_embed_lr_multiplier=0.2,
        )
        self.dino = DINOLoss(prototypes, "sinkhorn_knopp").to(device)
        self.ibot = IBOTLoss(prototypes, "sinkhorn_knopp").to(device)
        self.device = device

    def step(self, batch: dict[str, torch.Tensor], batched: bool) -> torch.Tensor:
        """Train one step; return the loss, still on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.batched_loss(batch) if batched else self.loss_by_view(batch)
        loss.backward()
        clip_by_global_norm(self.student, 3.0)
        self.optimizer.step()
        follow(self.teacher, self.student, MOMENTUM)
        return loss.detach()

    def batched_loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Ours: two dense batches, heads on the tokens that have a loss."""
        places = batch["masked_places"]
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            seen = self.teacher(batch["global"], None, None, places)
        with torch.autocast(self.device.type, torch.bfloat16):
            told = self.student(batch["global"], batch["local"], batch["masks"], places)
        num_views = len(batch["global"]) * VIEWS[0]
        ibot = self.ibot(told["patch_logits"], seen["patch_logits"], batch["masked_weights"], num_views, TEMP)
        return self.dino(told["cls_logits"], seen["cls_logits"], TEMP)["loss"] + ibot["loss"]

    def loss_by_view(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The plain loop."""
        seen, told = [], []
        with torch.autocast(self.device.type, torch.bfloat16):
            for view in range(VIEWS[0]):
                with torch.no_grad():
                    seen.append(heads_on_all(self.teacher, batch["global"][:, view], None))
            for view in range(VIEWS[0]):
                told.append(heads_on_all(self.student, batch["global"][:, view], batch["masks"][:, view]))
            for view in range(VIEWS[1]):
                told.append(heads_on_all(self.student, batch["local"][:, view], None))
        masks = batch["masks"].transpose(0, 1)
        targets = sinkhorn_in_place(torch.cat([cls for cls, _ in seen])).unflatten(0, (VIEWS[0], -1))
        pairs = [
            -(target * functional.log_softmax(cls.float() / STUDENT_TEMP, -1)).sum(-1).mean()
            for first, target in enumerate(targets)
            for second, (cls, _) in enumerate(told)
            if first != second
        ]
        patches = torch.stack([patch for _, patch in seen])
        aims = torch.zeros_like(patches, dtype=torch.float32)
        aims[masks] = sinkhorn_in_place(patches[masks])
        by_view = [
            -(aims[view] * functional.log_softmax(told[view][1].float() / STUDENT_TEMP, -1)).sum(-1)
            for view in range(VIEWS[0])
        ]
        ibot = [
            ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
            for loss, mask in zip(by_view, masks, strict=True)
        ]
        return torch.stack(pairs).mean() + torch.stack(ibot).mean()


def heads_on_all(
    network: Any,  # noqa: ANN401 (a DINOModel, or one that is distributed)
    images: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prototypes of the CLS token and of all patches of one view."""
    tokens = network.tokens(images, mask)
    return network.dino_head(tokens[:, 0]), network.ibot_head(tokens[:, network.encoder.num_prefix_tokens :])


@torch.no_grad()
def sinkhorn_in_place(logits: torch.Tensor) -> torch.Tensor:
    """SwAV's listing: the matrix is divided by its sums."""
    q = torch.exp(logits.float() / TEMP)
    q /= q.sum()
    for _ in range(SINKHORN_ITERATIONS):
        q /= q.sum(0, keepdim=True) * q.shape[1]
        q /= q.sum(1, keepdim=True) * q.shape[0]
    return q * q.shape[0]


def new_batch(batch_size: int, sizes: tuple[int, int], patch_px: int, device: torch.device) -> dict:
    """Random views and masks of the paper's shares."""
    generator = torch.Generator().manual_seed(1)
    groups = zip(("global", "local"), VIEWS, sizes, strict=True)
    batch = {
        group: torch.randn(batch_size, views, 1, side, side, generator=generator)
        for group, views, side in groups
    }
    drawn = PatchMasks(
        global_size_px=sizes[0],
        patch_size_px=patch_px,
        num_global=VIEWS[0],
        seed=0,
        mask_sample_prob=0.5,
        mask_ratio=(0.1, 0.5),
    )
    batch["masks"] = torch.stack([torch.from_numpy(drawn.draw(place)) for place in range(batch_size)])
    places, weights = masked_places(batch["masks"], drawn.most_masked(batch_size))
    batch |= {"masked_places": places, "masked_weights": weights}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def median_seconds(
    call: Callable[[], torch.Tensor], device: torch.device, repeats: int
) -> tuple[float, list]:
    """Median time of a call after two that warm up, and what all of them returned."""
    times, results = [], []
    for number in range(2 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        results.append(call())
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times), results


def main(
    batch_size: Annotated[int, typer.Option(help="Slabs a step. Default: 48 on a GPU, 8 on a CPU.")] = 0,
    repeats: Annotated[int, typer.Option(help="Steps timed; the median counts.", min=3)] = 5,
) -> None:
    """Time a step of ours and of a loop over views; compare their losses.

    Example: python benchmarks/dino_step.py
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    size, sizes = (VIT_L, (224, 98)) if on_gpu else (SMALL, (112, 42))
    prototypes = 65536 if on_gpu else 4096
    batch_size = batch_size or (48 if on_gpu else 8)
    batch = new_batch(batch_size, sizes, size["patch_size"], device)
    found = {}
    for name, ours in (("loop over views", False), ("ours", True)):
        networks = Networks(size, prototypes, device, compiled=on_gpu and ours)
        found[name] = median_seconds(partial(networks.step, batch, ours), device, repeats)
        encoder = networks.student.get_submodule("encoder")
        del networks
    (loop_s, loop_losses), (ours_s, ours_losses) = found["loop over views"], found["ours"]
    logits = torch.rand(batch["masked_places"].numel(), prototypes, device=device) * 2 - 1
    plain_s, (plain, *_) = median_seconds(partial(sinkhorn_in_place, logits), device, repeats)
    scales_s, (scaled, *_) = median_seconds(partial(sinkhorn_knopp, logits, TEMP), device, repeats)
    flops = training_flops(encoder, dict(zip(sizes, VIEWS, strict=True)))
    flops += training_flops(encoder, {sizes[0]: VIEWS[0]}) // 3  # the teacher's, forward only
    peak = peak_bf16_flops(device)
    table = Table(title=f"{'ViT-L/14' if on_gpu else 'Small ViT, no GPU'}, {batch_size} slabs x 16 views")
    for column in ("", "plain", "ours"):
        table.add_column(column, justify="right")
    table.add_row("s a step", f"{loop_s:.4f}", f"{ours_s:.4f}")
    table.add_row("slabs/s", f"{batch_size / loop_s:.1f}", f"{batch_size / ours_s:.1f}")
    table.add_row(f"ms Sinkhorn-Knopp {tuple(logits.shape)}", f"{plain_s * 1e3:.2f}", f"{scales_s * 1e3:.2f}")
    Console(stderr=True).print(table)
    where = (
        torch.cuda.get_device_name() if on_gpu else f"{platform.processor() or platform.machine()}, no GPU"
    )
    # bfloat16 rounds to 3 digits
    differ = max(abs(float(ours / loop) - 1) for ours, loop in zip(ours_losses, loop_losses, strict=True))
    line = {"name": "dino_step", "device": where, "torch": torch.__version__, "time_ratio": loop_s / ours_s}
    line |= {"max_rel_error": differ, "samples_per_s": batch_size / ours_s}
    line |= {"sinkhorn_time_ratio": plain_s / scales_s}
    line |= {"sinkhorn_max_rel_error": float(((scaled - plain).abs() / plain).max())}
    line |= {"mfu": batch_size * flops / ours_s / peak if peak else None}
    typer.echo(
        json.dumps(
            {key: round(value, 9) if isinstance(value, float) else value for key, value in line.items()}
        )
    )


if __name__ == "__main__":
    typer.run(main)
