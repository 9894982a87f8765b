"""Compare encoders of one size on shards with organ masks: what patch tokens know, how CLS tokens move.

The volumes are split by patient. A linear probe learns from patch tokens which organs cover at least a
quarter of their patch, on one half of the patients, and is scored on the other. The CLS tokens of every
volume's slices give their effective rank and the latent continuity of Table V. Our own protocol, for small
scale; the paper's tables have bundles of their own.
"""

# S slices, P patches, D embedding, C organs

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch.nn import functional

from common.data.patient_split import patient_of
from common.data.shards import ShardSet
from common.handlers.results_table import add_rows, code_version, config_hash
from common.metrics.effective_rank import effective_rank
from common.metrics.latent_continuity import DISTANCES, latent_continuity
from common.metrics.multilabel import auroc, average_precision
from common.networks.encoder import cls_and_patches
from common.transforms.hounsfield import HU_WINDOWS, normalize_hu

MIN_POSITIVES = 50
COVERED = 0.25


def new_encoder(config: dict, weights: Path | None) -> torch.nn.Module:
    """Build the encoder of a demo config, with registers if its weights have them; without weights random."""
    torch.manual_seed(0)
    tensors = {} if weights is None else load_file(weights)
    names = ("img_size", "patch_size")
    encoder = timm.create_model(
        f"vit_large_patch14_{'reg4_' if 'reg_token' in tensors else ''}dinov2",
        **{"in_chans": 1, "num_classes": 0, "dynamic_img_size": True},
        **{name: config[f"{name}_px"] for name in names},
        **{name: config[name] for name in ("embed_dim", "depth", "num_heads")},
        init_values=config["layer_scale_init"],
    )
    if tensors:
        encoder.load_state_dict(tensors)
    return encoder.eval()


def volume_inputs(
    shards: ShardSet, volume: int, size_px: int, patch_px: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Return a volume's slices as the encoder sees them (S, 1, size, size), its patches' organs (S P, C)."""
    entry = shards.volumes[volume]
    hu = np.stack([shards.read_ct(volume, z) for z in range(entry.num_slices)])
    image = normalize_hu(torch.from_numpy(hu).float()[:, None], HU_WINDOWS["ct_rate"])
    image = functional.interpolate(image, size=(size_px, size_px), mode="bilinear", antialias=True)
    ids = torch.from_numpy(shards.read_ts(volume, 0, entry.num_slices).astype(np.int64))
    cells = size_px // patch_px
    shares = torch.zeros(len(ids), cells * cells, 118)
    for organ in ids.unique().tolist():
        shares[..., organ] = functional.adaptive_avg_pool2d((ids == organ).float()[:, None], cells).flatten(1)
    return image, (shares.flatten(0, 1) >= COVERED).numpy()


def linear_probe(tokens: np.ndarray, organs: np.ndarray, steps: int = 300) -> torch.nn.Module:
    """Fit logistic regressions of all organs at once on standardized tokens."""
    x, y = torch.from_numpy(tokens), torch.from_numpy(organs).float()
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(x.shape[1], affine=False)
    norm.running_mean.copy_(x.mean(0))
    norm.running_var.copy_(x.var(0))
    probe = torch.nn.Sequential(norm.eval(), torch.nn.Linear(x.shape[1], y.shape[1]))
    optimizer = torch.optim.AdamW(probe[1].parameters(), lr=0.03, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (4096,))
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(probe(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return probe


@torch.no_grad()
def encode(encoder: torch.nn.Module, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return CLS (S, D) and patch tokens (S P, D)."""
    cls, patches = cls_and_patches(encoder, image)
    return cls.numpy(), patches.flatten(0, 1).numpy()


def compare(
    shards: ShardSet, encoders: dict[str, torch.nn.Module], size_px: int, patch_px: int
) -> list[dict]:
    """Return a row of scores for each encoder."""
    volumes = [index for index, entry in enumerate(shards.volumes) if entry.has_ts]
    patients = sorted({patient_of(shards.volumes[volume].volume) for volume in volumes})
    learning = set(np.random.default_rng(0).permutation(patients)[: len(patients) // 2].tolist())
    tokens: dict[str, dict[bool, list]] = {name: {True: [], False: []} for name in encoders}
    cls: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    organs: dict[bool, list] = {True: [], False: []}
    for volume in track(volumes, "Encoding volumes", console=Console(stderr=True)):
        image, labels = volume_inputs(shards, volume, size_px, patch_px)
        side = patient_of(shards.volumes[volume].volume) in learning
        organs[side].append(labels)
        for name, encoder in encoders.items():
            volume_cls, patches = encode(encoder, image)
            cls[name].append(volume_cls)
            tokens[name][side].append(patches)
    known = {side: np.concatenate(parts) for side, parts in organs.items()}
    kept = np.flatnonzero((known[True].sum(0) >= MIN_POSITIVES) & (known[False].sum(0) >= MIN_POSITIVES))
    rows = []
    for name in encoders:
        probe = linear_probe(np.concatenate(tokens[name][True]), known[True][:, kept])
        with torch.no_grad():
            scores = probe(torch.from_numpy(np.concatenate(tokens[name][False]))).double().numpy()
        truth = known[False][:, kept].astype(int)
        row = {"encoder": name, "organs": len(kept), "volumes": len(volumes)}
        row |= {"patch_auprc": float(average_precision(scores, truth).mean())}
        row |= {"patch_auroc": float(auroc(scores, truth).mean())}
        row |= {"cls_effective_rank": effective_rank(torch.from_numpy(np.concatenate(cls[name])))}
        for distance in DISTANCES:
            values = [latent_continuity(path, distance) for path in cls[name]]
            row[f"continuity_{distance}"] = float(np.nanmean(values))
        rows.append(row)
    return rows


def main(
    shards: Annotated[Path, typer.Option(help="Folder of shards with organ masks.")],
    split: Annotated[str, typer.Option(help="Split to use: none the encoders were trained on.")],
    encoder: Annotated[list[str], typer.Option(help="NAME=model.safetensors; once for each encoder.")],
    results_csv: Annotated[Path, typer.Option(help="CSV of all results, to which rows are added.")],
    config: Annotated[Path, typer.Option(help="The encoders' size.")] = Path("demo/inference.json"),
) -> None:
    """Compare encoders, and the same network with random weights.

    Example: python -m study.compare_variants --shards demo/out/shards --split valid --results-csv results.csv
    --encoder dale_ct_2s=demo/out/dale_ct_2s/model.safetensors
    """
    pairs = [pair.partition("=") for pair in encoder]
    missing = [path for _, _, path in pairs if not Path(path).is_file()]
    if missing:
        sys.exit(f"encoder must be NAME=FILE, got '{missing[0]}', which is no file. Train it first.")
    size = json.loads(config.read_text())
    networks = {"random_weights": new_encoder(size, None)}
    networks |= {name: new_encoder(size, Path(path)) for name, _, path in pairs}
    rows = compare(ShardSet(shards, split), networks, size["img_size_px"], size["patch_size_px"])
    shared = {"protocol": "patch_organs", "dataset": "ct_rate", "low": "", "high": "", "seeds": "0"}
    shared |= {"commit": code_version(), "config_hash": config_hash(size)}
    add_rows(
        results_csv,
        [
            {
                "encoder": row["encoder"],
                "metric": metric,
                "value": f"{row[metric]:.6f}",
                "n": str(row["volumes"]),
            }
            | shared
            for row in rows
            for metric in row.keys() - {"encoder", "volumes"}
        ],
    )
    table = Table(
        *rows[0], title=f"{rows[0]['volumes']} volumes of split {split}, {rows[0]['organs']} organs"
    )
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=max(Console().width, 140)).print(table)  # nine columns, in a log as well


if __name__ == "__main__":
    typer.run(main)
