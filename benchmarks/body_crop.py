"""Processor time of the body crop and resize of a CT, against opening the mask of every full slice.

    python benchmarks/body_crop.py

The plain way opens each slice's mask with two 25 x 25 max-pools, takes the union's square and resizes it, as
the released preprocessing does. Both work on the same slices in one process on one thread, in turns; medians
of processor time, so that a busy machine matters less. Ends in one line of JSON.
"""

# Z slices, H side of a slice, I side of an image

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.ct.files import ct_file, read_ct
from common.transforms.slice_strategies import SliceStrategy, body_box, pad_to_square

THRESHOLD_HU, OPENING_PX, SIZE_PX = -500, 25, 256
NATIVE_CT = "lidc_idri_0314_ct_native_slices130_162"
Box = tuple[int, int, int]
STRATEGY = SliceStrategy(f"cropped_{SIZE_PX}", 16)


def ct_slices() -> tuple[torch.Tensor, str]:
    """Return int16 slices of 512 x 512, and say what they are of."""
    stated = os.environ.get("DALE_CT_TEST_DATA")
    real = Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "data"
    if real.is_dir():
        hu = pad_to_square(read_ct(ct_file(real / f"{NATIVE_CT}.nii.gz")).hu, -1024)
        return torch.from_numpy(hu), f"{len(hu)} slices of a real CT (LIDC-IDRI-0314)"
    rows, columns = np.mgrid[:512, :512]
    body = ((rows - 270) / 150) ** 2 + ((columns - 250) / 210) ** 2 <= 1
    hu = np.where(body, 40, -1000) + np.random.default_rng(0).integers(-30, 31, (32, 512, 512))
    hu[:, 480:487] = 300  # the table
    return torch.from_numpy(hu.astype(np.int16)), "32 synthetic slices, without those of DALE_CT_TEST_DATA"


def ours(hu: torch.Tensor) -> tuple[Box, torch.Tensor]:
    """Return box and images, the way of this repository."""
    box = body_box(hu)
    return box, STRATEGY(STRATEGY.region(hu, box))


def plain_box(hu: torch.Tensor) -> Box:
    """Open every slice, take the union, its bounding box, and make that square inside the image."""
    union = torch.zeros(hu.shape[1:], dtype=torch.bool)
    margin, size = OPENING_PX // 2, hu.shape[-1]
    for hu_slice in hu:
        mask = (hu_slice > THRESHOLD_HU).float()[None, None]
        eroded = 1 - functional.max_pool2d(1 - mask, OPENING_PX, stride=1, padding=margin)
        union |= functional.max_pool2d(eroded, OPENING_PX, stride=1, padding=margin)[0, 0] > 0
    (top, bottom), (left, right) = (
        (int(places.min()), int(places.max()) + 1)
        for places in (union.any(1).nonzero(), union.any(0).nonzero())
    )
    side = max(bottom - top, right - left)
    first = [min(max((a + b - side) // 2, 0), size - side) for a, b in ((top, bottom), (left, right))]
    return first[0], first[1], side


def plain(hu: torch.Tensor) -> tuple[Box, torch.Tensor]:
    """Return box and images, the plain way."""
    top, left, side = plain_box(hu)
    crop = hu[:, None, top : top + side, left : left + side].float()
    return (top, left, side), functional.interpolate(
        crop, (SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False, antialias=True
    )


def seconds_of(action: Callable[[], object]) -> float:
    """Processor seconds of an action."""
    started = time.process_time()
    action()
    return time.process_time() - started


def main(repeats: Annotated[int, typer.Option(help="Turns of either.")] = 5) -> None:
    """Compare both ways and print a table and a line of JSON."""
    torch.set_num_threads(1)
    hu, what = ct_slices()
    (box, images), (expected_box, expected) = ours(hu), plain(hu)
    assert box == expected_box, (box, expected_box)
    ways = {
        "ours": lambda: ours(hu),
        "plain": lambda: plain(hu),
        "our box": lambda: body_box(hu),
        "plain box": lambda: plain_box(hu),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(seconds_of(way))
    ms = {name: 1000 * statistics.median(of) / len(hu) for name, of in times.items()}
    table = Table("", "ours, ms a slice", "plain, ms a slice", "ratio", title=what)
    for name, own, other in (("box and resize", "ours", "plain"), ("box alone", "our box", "plain box")):
        table.add_row(name, f"{ms[own]:.2f}", f"{ms[other]:.1f}", f"{ms[other] / ms[own]:.0f}")
    Console(width=100).print(table)
    result = {
        "name": "body_crop",
        "time_ratio": ms["plain"] / ms["ours"],
        "box_time_ratio": ms["plain box"] / ms["our box"],
        "max_rel_error": float((images - expected).abs().max() / expected.abs().max()),
        "boxes_equal": box == expected_box,
        "ms_a_slice": ms,
    }
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
