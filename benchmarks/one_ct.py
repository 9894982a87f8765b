"""From one NIfTI to its embedding on one core, beside the plain way, and beside MONAI's command line.

    python benchmarks/one_ct.py                  # a synthetic CT of 512 x 512 x 300
    python benchmarks/one_ct.py ct.nii.gz        # slices of a scan of yours, there and back up to 300

Plain is what one would write with nibabel, SciPy and a loop around timm, in ``one_ct_ways.py``: the same
preprocessing and, which is asserted, the same images. Each way runs in processes of its own, in turns;
figures are processor time in medians, so that a busy machine matters less. A stand-in takes the encoder's
place but for a few slices, whose time is multiplied: both ways run the same network, with random weights from
a file. To load is to import timm, build the network and read its weights. ``bundle`` is
``python -m monai.bundle run`` of the same job up to the first images. Ends in a line of JSON an encoder; its
ratios are the other way over ours.
"""

# X Y Z stored axes

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from isal import igzip
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from benchmarks.prepare_volume import make_inputs, save_gzipped
from common.networks.encoder import save_encoder
from common.transforms.hounsfield import hu_window
from dale_ct.encoder import SliceEncoder, load_encoder

WAYS = Path(__file__).with_name("one_ct_ways.py")
PARTS = ("import", "load", "read", "crop", "resize", "write")
TOLERANCE = 2e-5
"""How far images may differ, in standard deviations of HU: float32 rounds a resize so."""


def run(way: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a way in a process of its own; returns its report, with its processor seconds of each part."""
    command = [sys.executable, str(WAYS), way]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = os.times()
    stated = settings | {"started": time.clock_gettime(time.CLOCK_MONOTONIC)}
    done = subprocess.run(
        [*command, json.dumps(stated)], capture_output=True, text=True, env=os.environ | threads
    )
    after = os.times()
    if done.returncode:
        raise RuntimeError(f"'{way}' failed: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    used = after.children_user + after.children_system - before.children_user - before.children_system
    if "parts" in report:  # what belongs to no other part is the interpreter and its imports
        parts = report["parts"]
        parts["import"] = used - sum(parts.values())
        parts["all but the encoder"] = used - parts["encode"]
    return report


def settings_of(name: str, folder: Path, encoded: int) -> dict[str, Any]:
    """Say what the ways need to know of an encoder, with random weights in a file."""
    opened = load_encoder(name, "random", "cpu")
    assert isinstance(opened, SliceEncoder), f"{name} takes volumes, not slices"
    config, network = opened.config, opened.network
    window = list(hu_window(config["weights_hu_window"]))
    facts = {"slice_axes": config["weights_slice_axes"], "hu_window": window}
    path = folder / f"{name}.safetensors"
    save_encoder(network.state_dict(), path, {"name": name, **facts})
    written = {key: value for key, value in config["network_def"].items() if not key.startswith("_")}
    known = {key: config[x[1:]] if str(x).startswith("@") else x for key, x in written.items()}
    return {
        "encoder": name,
        "weights": str(path),
        "network": known,
        "window": window,
        "slice_axes": facts["slice_axes"],
        "side_px": opened.strategy.size_px,
        "batch": config["slices_per_batch"],
        "encoded": encoded,
    }


def stacked(ct: Path, folder: Path, num_slices: int) -> Path:
    """Write a scan's slices there and back until there are enough."""
    hu = np.asanyarray(nib.nifti1.Nifti1Image.from_filename(ct).dataobj).astype(np.int16)
    rows = np.pad(np.arange(hu.shape[2]), (0, max(0, num_slices - hu.shape[2])), mode="reflect")
    return save_gzipped(np.asfortranarray(hu[..., rows[:num_slices]]), folder / "ct.nii.gz")


def measured(settings: dict[str, Any], ct: Path, folder: Path, repeats: int) -> dict[str, list[Any]]:
    """Run all ways in turns; the first turn warms up, compares the images and times the encoder."""
    opened = folder / "plain.nii"
    with igzip.open(ct) as packed, opened.open("wb") as file:
        shutil.copyfileobj(packed, file, 2**20)
    reports: dict[str, list[Any]] = {}
    for turn in range(repeats + 1):
        for way, path in (("plain", ct), ("ours", ct), ("bundle", ct), ("plain", opened), ("ours", opened)):
            key = way if path == ct else f"{way}, .nii"
            out = folder / f"out_{turn}_{key[-4:]}{way}"
            images = {"images": str(folder / f"{way}.npy")} if turn == 0 and path == ct else {}
            report = run(way, settings | images | {"ct": str(path), "out": str(out)})
            reports.setdefault(key, []).append(report)
            shutil.rmtree(out, ignore_errors=True)
        if turn == 0:
            plain, own = (np.load(folder / f"{way}.npy") for way in ("plain", "ours"))
            assert plain.shape == own.shape
            reports["error"] = [float(np.abs(plain - own).max())]
            assert reports["error"][0] < TOLERANCE, f"images differ by {reports['error'][0]}"
    reports["twice"] = [run("twice", settings | {"ct": str(ct)})]
    return reports


def middle(reports: list[dict[str, Any]], *names: str) -> float:
    """Return the median of a figure over all turns but the first."""
    values = []
    for report in reports[1:]:
        value: Any = report
        for name in names:
            value = value.get(name, 0.0)
        values.append(float(value))
    return statistics.median(values)


def figures(settings: dict[str, Any], reports: dict[str, list[Any]], num_slices: int) -> dict[str, Any]:
    """Print a table of an encoder, and return its line of JSON."""
    table = Table(title=f"{settings['encoder']}, {num_slices} slices, one core: processor seconds")
    for column in ("", "plain", "ours", "plain / ours", "plain, .nii", "ours, .nii", "plain / ours"):
        table.add_column(column, justify="right" if column else "left")
    line: dict[str, Any] = {"name": "one_ct", "encoder": settings["encoder"], "slices": num_slices}
    for part in (*PARTS, "all but the encoder"):
        row = [middle(reports[key], "parts", part) for key in ("plain", "ours", "plain, .nii", "ours, .nii")]
        ratios = [row[0] / row[1] if row[1] else np.nan, row[2] / row[3] if row[3] else np.nan]
        table.add_row(part, *(f"{x:.2f}" for x in (row[0], row[1], ratios[0], row[2], row[3], ratios[1])))
        line |= {f"{part} s, plain": row[0], f"{part} s": row[1]}
    encode = [reports[way][0]["first"]["encode_a_slice"] * num_slices for way in ("plain", "ours")]
    table.add_row("encode (of a few slices)", *(f"{x:.0f}" for x in encode), f"{encode[0] / encode[1]:.2f}")
    Console(width=120).print(table)
    first = {way: [middle(reports[way], "first", clock) for clock in ("wall", "processor")] for way in FIRST}
    again, before = reports["twice"][0]["calls"][1], reports["twice"][0]["calls"][0]
    return line | {
        "encode s, plain": encode[0],
        "encode s": encode[1],
        "time_ratio": line["all but the encoder s, plain"] / line["all but the encoder s"],
        "time_ratio, .nii": ratios[1],
        **{f"first slice {way}, wall s": of_way[0] for way, of_way in first.items()},
        **{f"first slice {way}, processor s": of_way[1] for way, of_way in first.items()},
        "first_slice_ratio": first["bundle"][0] / first["ours"][0],
        "first_slice_ratio, processor": first["bundle"][1] / first["ours"][1],
        "load s, first call": before["load"],
        "load s, second call": again["load"],
        "first slice, second call, wall s": again["first"],
        "max_rel_error": reports["error"][0],
    }


FIRST = ("plain", "ours", "bundle")


def main(
    ct: Annotated[Path | None, typer.Argument(help="A CT in NIfTI, in HU. Default: a synthetic one.")] = None,
    encoders: Annotated[str, typer.Option(help="Encoders of slices, with commas.")] = "dale_ct_2s",
    slices: Annotated[int, typer.Option(help="Slices of the CT.", min=2)] = 300,
    repeats: Annotated[int, typer.Option(help="Times each way is measured.", min=1)] = 3,
    encoded: Annotated[int, typer.Option(help="Slices that the encoder is timed on.", min=1)] = 2,
) -> None:
    """Measure and print a table and a line of JSON for each encoder."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = make_inputs(folder, slices).ct if ct is None else stacked(ct, folder, slices)
        for name in encoders.split(","):
            settings = settings_of(name, folder, encoded)
            line = figures(settings, measured(settings, path, folder, repeats), slices)
            Path(settings["weights"]).unlink()
            rounded = {key: round(x, 7) if isinstance(x, float) else x for key, x in line.items()}
            typer.echo(json.dumps(rounded))


if __name__ == "__main__":
    typer.run(main)
