"""Processor time of one finished sample, 10 normalised views and their soft labels, against the plain way.

    python benchmarks/views.py

The plain way decodes every slice of the slab to float32, loops over the crops and pools one-hot maps. Both
read the same shards in one process on one thread, in turns; medians of processor time, so that a busy machine
matters less. Ends in one line of JSON.
"""

# V views, S view size, H W slice pixels

import inspect
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.ct.files import ct_file, read_ct
from common.shards.shards import ShardSet
from common.shards.slab_dataset import VIEWS, SlabViews
from common.shards.writer import VolumeSlices, write_shard
from common.transforms.hounsfield import HU_WINDOWS
from common.transforms.multi_crop import RandSlabMultiCrop, ViewPlan
from common.transforms.render_views import count_labels, render_views
from data_prep.sources.totalsegmentator import read_label_map

RECIPE = Path(__file__).resolve().parents[1] / "bundles" / "_recipes" / "lejepa_train.json"
PATCH_SIZE_PX, SIZES_PX = 16, (256, 144)  # DALE-CT-2S
WINDOW = HU_WINDOWS["ct_rate"]
NUM_VOLUMES, NUM_SLICES = 5, 32
NATIVE_CT, LABELLED_CT = "lidc_idri_0314_ct_native_slices130_162", "totalseg_dicom_ct_native"
Sample = dict[str, torch.Tensor]


def write_cohort(folder: Path) -> tuple[ShardSet, str]:
    """Write shards of 512 x 512 slices 1 mm apart, one volume in five annotated; say what they are of."""
    stated = os.environ.get("DALE_CT_TEST_DATA")
    real = Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "data"
    rng = np.random.default_rng(0)
    if real.is_dir():
        what = "a real CT of 512 x 512, 1 mm (LIDC-IDRI-0314), under another patient's organ labels"
        ct = read_ct(ct_file(real / f"{NATIVE_CT}.nii.gz")).hu
        labelled = read_ct(ct_file(real / f"{LABELLED_CT}.nii.gz"))
        ts = read_label_map(real / f"{LABELLED_CT.replace('_ct_', '_seg117_')}.nii.gz", labelled.grid)
        ts = np.concatenate([ts, ts[::-1]])[:NUM_SLICES]
    else:
        what = "a synthetic CT of 512 x 512, 1 mm, without the real ones of DALE_CT_TEST_DATA"
        organ = rng.integers(0, 118, (NUM_SLICES // 8, 12, 12)).repeat(8, 0).repeat(11, 1).repeat(11, 2)
        ts = organ[:, :128, :128].astype(np.uint8)
        smooth = (ts.astype(np.int16) * 16 - 900).repeat(4, 1).repeat(4, 2)
        ct = (smooth + rng.normal(0, 30, smooth.shape)).astype(np.int16)
    rex = np.zeros(ts.shape, np.uint16)
    rex[8:24, 50:64, 70:80] = 5

    def volume(number: int, annotated: bool) -> VolumeSlices:
        return VolumeSlices(
            volume=f"train_{number}_a_1",
            ct=ct,
            ts=ts,
            rex=rex if annotated else None,
            spacing_mm=(0.8, 0.8, 1.0),
            original_shape=(512, 512, len(ct)),
            original_axcodes="LPS",
            labels=None,
            split="train",
        )

    write_shard(folder / "train-000000.tar", [volume(number, False) for number in range(1, NUM_VOLUMES)])
    write_shard(folder / "train-rex-000000.tar", [volume(0, True)])
    return ShardSet(folder, "train"), what


def slab_views(shards: ShardSet) -> SlabViews:
    """Return the samples of DALE-CT-2S."""
    knobs = json.loads(RECIPE.read_text())
    names = inspect.signature(RandSlabMultiCrop).parameters
    crop = RandSlabMultiCrop(**{name: knobs[name] for name in names})
    return SlabViews(shards=shards, slab_mm=12.0, rex_fraction=0.2, seed=0, multi_crop=crop, with_masks=True)


def finished(slabs: SlabViews, places: range) -> tuple[tuple[torch.Tensor, ...], dict]:
    """Return views and soft labels of a batch, the way of this repository."""
    batch = slabs.collate([slabs[place] for place in places])
    return render_views(batch, WINDOW), count_labels(batch, "presence")


def plain_slab(slabs: SlabViews, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, ViewPlan]:
    """Return a whole slab as float32, its masks, and the plan of its views."""
    volume, first, length = slabs.slab_of(place)
    slab = slabs.shards.read_slab(volume, first, length)
    hu = np.stack([slab.read_ct(z).astype(np.float32) for z in range(length)])
    ts, rex = slab.read_ts(), slab.read_rex()
    rng = np.random.default_rng([slabs.seed, VIEWS, place])
    plan = slabs.multi_crop.draw(rng, length, hu.shape[1:], ts, rex)
    empty = np.zeros((length, 128, 128), np.uint16)
    return hu, empty if ts is None else ts, empty if rex is None else rex, plan


def plain_view(hu: np.ndarray, plan: ViewPlan, view: int) -> torch.Tensor:
    """Crop, resize, augment and normalise one view of a slab, (S, S)."""
    z, top, left, side = plan.boxes[view].tolist()
    size, sigma = SIZES_PX[view >= 2], float(plan.blur_sigma[view])
    crop = torch.from_numpy(hu[z, top : top + side, left : left + side])[None, None]
    image = functional.interpolate(crop, (size, size), mode="bilinear", antialias=True)
    image = image.flip(-1) if plan.flips[view] else image
    unit = (image.clamp(WINDOW.min_hu, WINDOW.max_hu) - WINDOW.min_hu) / (WINDOW.max_hu - WINDOW.min_hu)
    unit = unit ** float(plan.gamma[view])
    if sigma > 0:
        weights = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=unit.dtype) / (2 * sigma**2))
        kernel = torch.outer(weights, weights)
        padded = functional.pad(unit, (1, 1, 1, 1), mode="reflect")
        unit = functional.conv2d(padded, (kernel / kernel.sum())[None, None])
    image = unit * (WINDOW.max_hu - WINDOW.min_hu) + WINDOW.min_hu
    return ((image - WINDOW.mean_hu) / WINDOW.std_hu)[0, 0]


def plain_labels(
    ts: np.ndarray, rex: np.ndarray, shape: tuple[int, int], plan: ViewPlan, view: int
) -> Sample:
    """Enlarge, crop and resize the masks of one view; pool their one-hot maps."""
    size = SIZES_PX[view >= 2]
    under = [mask_under(masks, shape, plan, view, size) for masks in (ts, rex)]
    organs = functional.one_hot(under[0], 118).movedim(-1, 0).float()
    findings = torch.stack([(under[1] >> k) & 1 for k in range(14)]).float()
    shares = functional.avg_pool2d(organs, PATCH_SIZE_PX).flatten(1).T
    present = functional.max_pool2d(findings, PATCH_SIZE_PX).flatten(1).T
    return {
        "ts_cls": organs.mean((1, 2)),
        "ts_patch": shares,
        "rex_cls": findings.amax((1, 2)),
        "rex_patch": present,
    }


def mask_under(
    masks: np.ndarray, shape: tuple[int, int], plan: ViewPlan, view: int, size: int
) -> torch.Tensor:
    """Return the mask of one view, (S, S)."""
    z, top, left, side = plan.boxes[view].tolist()
    enlarged = nearest(masks[z], *shape)
    resized = nearest(enlarged[top : top + side, left : left + side], size, size)
    return torch.from_numpy((resized[:, ::-1] if plan.flips[view] else resized).astype(np.int64))


def nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to the nearest pixel, in whole numbers."""
    rows, columns = (
        (2 * np.arange(size) + 1) * length // (2 * size)
        for length, size in zip(image.shape, (height, width), strict=True)
    )
    return image[rows][:, columns]


def plain_sample(
    slabs: SlabViews, place: int, dtype: type[np.floating] = np.float32
) -> tuple[list[torch.Tensor], list[Sample]]:
    """Return views and soft labels of one sample, the plain way."""
    hu, ts, rex, plan = plain_slab(slabs, place)
    hu = hu.astype(dtype, copy=False)
    shape = hu.shape[1], hu.shape[2]
    num_views = len(plan.boxes)
    views = [plain_view(hu, plan, view) for view in range(num_views)]
    return views, [plain_labels(ts, rex, shape, plan, view) for view in range(num_views)]


def errors(slabs: SlabViews, number: int) -> tuple[float, bool]:
    """Return the views' largest error against float64, relative to the largest value; if labels are equal."""
    views, labels = finished(slabs, range(number))
    worst, equal = 0.0, True
    for place in range(number):
        expected_views, expected_labels = plain_sample(slabs, place, np.float64)
        for view, (image, terms) in enumerate(zip(expected_views, expected_labels, strict=True)):
            group, inside = (0, view) if view < 2 else (1, view - 2)
            found = views[group][place, inside, 0]
            worst = max(worst, float((found - image).abs().max() / image.abs().max()))
            by_term = labels[("global", "local")[group]]
            equal &= all(torch.equal(by_term[term][place, inside], terms[term]) for term in terms)
    return worst, equal


def milliseconds(
    passes: dict[str, Callable[[], object]], samples: dict[str, int], repeats: int
) -> dict[str, float]:
    """Median processor time a sample of each pass, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, once in passes.items():
            start = time.process_time()
            once()
            spent[name].append((time.process_time() - start) * 1e3 / samples.get(name, 1))
    return {name: statistics.median(times) for name, times in spent.items()}


def main(
    repeats: int = typer.Option(7, help="Passes of which the median is taken."),
    batch_size: int = typer.Option(32, help="Samples of a batch."),
) -> None:
    """Measure finished samples against the plain way."""
    torch.set_num_threads(1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        shards, what = write_cohort(Path(folder))
        slabs = slab_views(shards)
        console.print(f"Shards of {what}. One thread; torch {torch.__version__}.", markup=False)
        error, labels_equal = errors(slabs, number=6)
        places = range(batch_size)
        items = [slabs[place] for place in places]
        batch = slabs.collate(items)
        few = range(2)
        read = [plain_slab(slabs, place) for place in few]
        passes: dict[str, Callable[[], object]] = {
            "finished sample": lambda: finished(slabs, places),
            "  read, draw, cut": lambda: [slabs[place] for place in places],
            "  collate": lambda: slabs.collate(items),
            "  render": lambda: render_views(batch, WINDOW),
            "  count labels": lambda: count_labels(batch, "presence"),
            "plain sample": lambda: [plain_sample(slabs, place) for place in few],
            "  plain labels": lambda: [
                plain_labels(ts, rex, hu.shape[1:], plan, view)
                for hu, ts, rex, plan in read
                for view in range(len(plan.boxes))
            ],
        }
        samples = {name: len(few) if "plain" in name else batch_size for name in passes}
        spent = milliseconds(passes, samples, repeats)
    table = Table(title="Processor time a sample, ms")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, ms in spent.items():
        table.add_row(name, f"{ms:.2f}")
    console.print(table)
    line = {
        "name": "views",
        "time_ratio": spent["plain sample"] / spent["finished sample"],
        "max_rel_error": error,
        "ms_per_sample": spent["finished sample"],
        "labels_time_ratio": spent["  plain labels"] / spent["  count labels"],
        "labels_equal": labels_equal,
        "data": "real" if "real CT" in what.split(",")[0] else "synthetic",
    }
    typer.echo(json.dumps({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    typer.run(main)
