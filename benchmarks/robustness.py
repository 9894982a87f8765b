"""The robustness card's one pass over each CT against one embedding run per change.

The plain way writes each changed CT as NIfTI, as ``data_prep turned`` does, and embeds that: read, find the
body, crop, resize, normalise. "in memory" spares it the files: it reads each CT anew for each change, and
changes it. Both have our functions and run in one process, so that no starts count against them. The encoder
is a mean over pixels in all: everything but it is measured.
"""

import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import nibabel as nib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # of the repository, where this may run from
if TYPE_CHECKING:
    from common.embeddings.ct_batches import SliceBatches
    from common.embeddings.work import CTSlices, CTSource

SETTINGS = {"slice_axes": "yx", "slices_per_batch": 128, "num_workers": 0, "padded": False}
SEED, SLICE_MM = 0, (2.5, 2.5)
Tokens = dict[tuple[str, str], torch.Tensor]


def means(batches: "SliceBatches", kind: str | None = None) -> Tokens:
    """Return the mean of each image by volume and kind of scan."""
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for batch in batches:
        parts = batch["image"].mean((1, 2, 3)).split([piece.num_images for piece in batch["pieces"]])
        for piece, part in zip(batch["pieces"], parts, strict=True):
            found.setdefault((piece.task.volume, kind or piece.task.store), []).append(part)
    return {key: torch.cat(parts) for key, parts in found.items()}


def read_changed(source: "CTSource", change: str, strength: float) -> "CTSlices":
    """Read a volume and change it."""
    from common.ct.rejection import RejectedError
    from common.embeddings.changed_scans import generator_of
    from common.embeddings.work import CTSlices
    from common.transforms.scan_changes import CHANGES, Scan

    ct = source.read()
    hu = torch.from_numpy(ct.hu)
    if not change:
        return ct
    generator = generator_of(SEED, source.volume, change, torch.device("cpu"))
    changed = CHANGES[change].apply(Scan(hu, ct.spacing_mm, torch.arange(len(hu))), strength, generator)
    if changed is None:
        raise RejectedError("change", "does not allow it")
    return CTSlices(changed.hu.numpy(), changed.spacing_mm)


def read_file(source: "CTSource", change: str, strength: float, folder: Path) -> "CTSlices":
    """Read a volume, change it, write that as NIfTI, and read it again."""
    from common.embeddings.work import ct_sources

    ct = read_changed(source, change, strength)
    x, y, z = ct.spacing_mm
    image = nib.Nifti1Image(ct.hu.transpose(2, 1, 0), np.diag([-x, -y, z, 1.0]))
    path = folder / f"{source.volume}.nii.gz"
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    ((written,), _) = ct_sources(path)
    return written.read()


def plain(
    sources: Sequence["CTSource"], changes: list[tuple[str, float]], parts: dict, *folder: Path
) -> Tokens:
    """Run once for each change, by files if there is a folder for them."""
    from common.embeddings.changed_scans import UNCHANGED, label
    from common.embeddings.ct_batches import SliceBatches

    (name,) = (strategy.name for strategy in parts["strategies"])
    found: Tokens = {}
    read = read_file if folder else read_changed
    for change, strength in (("", 0.0), *changes):
        work = [
            source._replace(read=partial(read, source, change, strength, *folder), stores=(name,))
            for source in sources
        ]
        kind = label(change, strength) if change else UNCHANGED
        found |= means(SliceBatches(work=work, **parts), kind)
    return found


def ours(sources: Sequence["CTSource"], changes: list[tuple[str, float]], parts: dict) -> Tokens:
    """Read each CT once."""
    from common.embeddings.changed_scans import ChangedScans

    return means(ChangedScans(changes=changes, seed=SEED, masks={}, work=sources, **parts))


def main(
    volumes: Annotated[int, typer.Option(help="Phantoms.")] = 2,
    matrix: Annotated[int, typer.Option(help="Rows and columns of a slice.")] = 512,
    repeats: Annotated[int, typer.Option(help="Runs of each way, in turns.")] = 3,
) -> None:
    """Compare the two ways on phantoms."""
    from common.embeddings.work import ct_sources
    from common.transforms.hounsfield import HU_WINDOWS
    from common.transforms.scan_changes import chosen_changes
    from common.transforms.slice_strategies import SliceStrategy
    from data_prep.phantom.cohort import Settings, write_cohort

    torch.set_num_threads(1)
    parts = {
        **SETTINGS,
        "strategies": [SliceStrategy("cropped_256", 16)],
        "window": HU_WINDOWS["ct_rate"],
        "device": torch.device("cpu"),
    }
    tokens: dict[str, Tokens] = {}
    with tempfile.TemporaryDirectory() as folder:
        list(write_cohort(Path(folder), volumes, Settings(matrix=matrix, slice_mm=SLICE_MM), 1))
        sources = [
            source
            for split in ("train", "valid")
            if (path := Path(folder) / "dataset" / f"{split}_fixed").is_dir()
            for source in ct_sources(path)[0]
        ]
        ways: dict[str, Callable[..., Tokens]] = {
            "plain": lambda *of: plain(*of, Path(folder)),
            "in memory": plain,
            "ours": ours,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                start = time.process_time()
                tokens[name] = way(sources, chosen_changes(None), parts)
                seconds[name].append(time.process_time() - start)
    error = 0.0
    for other in ("plain", "in memory"):
        assert tokens[other].keys() <= tokens["ours"].keys()  # the reader refuses files rescaled twice
        differences = [float((tokens["ours"][key] - of).abs().max()) for key, of in tokens[other].items()]
        error = max(error, *differences)
    slices = sum(len(of) for of in tokens["ours"].values())
    table = Table(
        title=f"{volumes} phantoms of {matrix} x {matrix}, {slices} slices of all changes, one thread"
    )
    for head in ("way", "processor s", "ms a slice"):
        table.add_column(head)
    for name, of_way in seconds.items():
        table.add_row(name, f"{median(of_way):.1f}", f"{1e3 * median(of_way) / slices:.2f}")
    Console().print(table)
    ratios = {
        name: round(median(seconds[name]) / median(seconds["ours"]), 2) for name in ("plain", "in memory")
    }
    result = {
        "time_ratio": ratios["plain"],
        "time_ratio_in_memory": ratios["in memory"],
        "max_rel_error": error,
    }
    Console().print_json(json.dumps({"name": "robustness", **result}), indent=None)


if __name__ == "__main__":
    typer.run(main)
