"""What ``common.ct.checks`` says of scans as they are, turned, cut and resampled: for docs/checks.md.

``python benchmarks/checks.py FOLDER`` judges every CT of a folder; ``--seconds`` times the checks.
"""

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from common.ct.checks import find_doubts
from common.ct.files import find_cts, read_ct
from common.ct.geometry import HUValues
from common.ct.rejection import RejectedError

Form = tuple[str, np.ndarray, tuple[float, float, float]]


def forms(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> Iterator[Form]:
    """Yield a volume in every form with the name of the form."""
    x, y, z = spacing_mm
    depth, height, width = hu.shape
    yield "as it is", hu, spacing_mm
    yield "every 2nd voxel", hu[::2, ::2, ::2], (2 * x, 2 * y, 2 * z)
    yield "3 voxels for 1", hu.repeat(3, 1).repeat(3, 2), (x / 3, y / 3, z)
    yield "head and feet exchanged", hu[::-1], spacing_mm
    yield "front and back exchanged", hu[:, ::-1], spacing_mm
    yield "mirrored", hu[:, :, ::-1], spacing_mm
    yield "rows and columns exchanged", hu.transpose(0, 2, 1), (y, x, z)
    yield "coronal slices", hu.transpose(1, 0, 2), (x, z, y)
    yield "sagittal slices", hu.transpose(2, 1, 0), (z, y, x)
    yield "right half", hu[:, :, : width // 2], spacing_mm
    yield "left half", hu[:, :, width // 2 :], spacing_mm
    yield "front half", hu[:, : height // 2], spacing_mm
    yield "back half", hu[:, height // 2 :], spacing_mm
    yield "lower half", hu[: depth // 2], spacing_mm
    yield "upper half", hu[depth // 2 :], spacing_mm
    yield "HU + 1024 (raw)", (hu + np.int16(1024)).clip(-1024, 3071), spacing_mm
    yield "HU - 1024 (rescaled twice)", (hu - np.int16(1024)).clip(-1024, 3071), spacing_mm


def show(line: str) -> None:
    """Print a line."""
    sys.stdout.write(line + "\n")


def table_of(folder: Path) -> None:
    """Print a line for each form: how many volumes pass, are doubted and are refused, and by which rules."""
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    rules: dict[str, Counter[str]] = defaultdict(Counter)
    for file in find_cts(folder)[0]:
        try:
            ct = read_ct(file)
        except RejectedError as error:
            show(f"'{file.path}' cannot be read: {error}")
            continue
        for form, hu, spacing_mm in forms(ct.hu, ct.spacing_mm):
            doubts, _ = find_doubts(hu, spacing_mm)
            is_refused = any(doubt.refused for doubt in doubts)
            verdicts[form]["refused" if is_refused else "doubted" if doubts else "passed"] += 1
            rules[form].update(doubt.rule for doubt in doubts)
    show("| form | passed | doubted | refused | questions answered outside their range |")
    show("|---|---|---|---|---|")
    for form, counts in verdicts.items():
        numbers = " | ".join(str(counts[name]) for name in ("passed", "doubted", "refused"))
        show(f"| {form} | {numbers} | {', '.join(f'{rule} {n}' for rule, n in rules[form].most_common())} |")


def seconds_of() -> None:
    """Print what the checks and the sample for them take of a chest of 512 x 512 x 300 voxels."""
    from data_prep.phantom.population import roster
    from data_prep.phantom.scan import render

    scan = render(roster(1, seed=1)[0], "a", 128, (4.0, 4.0), {})
    z = np.linspace(0, len(scan.hu) - 1, 300).round().astype(int)
    hu = scan.hu[z].clip(-1024, 3071).repeat(4, 1).repeat(4, 2)
    spacing_mm = (scan.protocol.pixel_mm / 4, scan.protocol.pixel_mm / 4, 4.0 * len(scan.hu) / 300)
    for name, call in (
        ("find_doubts", lambda: find_doubts(hu, spacing_mm)),
        ("HUValues.add", lambda: sample(hu)),
    ):
        times = []
        for _ in range(5):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        show(f"{name}: {1000 * min(times):.0f} ms of processor time, best of 5, {hu.shape}")


def sample(hu: np.ndarray) -> None:
    """Do what a reader does for the checks beside its own work."""
    seen = HUValues()
    for plane in hu:
        seen.add(plane)


def main(
    folder: Annotated[
        Path | None, typer.Argument(help="CTs whose turned and cut forms are judged.", exists=True)
    ] = None,
    seconds: Annotated[bool, typer.Option("--seconds", help="Time the checks.")] = False,
) -> None:
    """Print what the checks say of CTs in many forms, or how long they take."""
    if folder is not None:
        table_of(folder)
    if seconds:
        seconds_of()


if __name__ == "__main__":
    typer.run(main)
