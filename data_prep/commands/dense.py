"""``dense-labels`` and ``dense-overlay``: what every patch of annotated scans shows (Table I)."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.cohort.cohort import load_labels
from common.ct.rejection import is_failure
from common.run.process import atomic_file
from data_prep.cluster import dask_client
from data_prep.commands.console import console, left_out, progress_bars
from data_prep.commands.options import CTRateMaps, CTRateRoot, FirstVolumes, Scheduler, Workers
from data_prep.dense_labels import dense_labels_of, write_all
from data_prep.sources.ct_rate import find_ct_rate
from data_prep.sources.rexgroundingct import read_annotations
from data_prep.sources.source_volume import SourceVolume


def dense_labels(
    root: CTRateRoot,
    rexgroundingct: Annotated[Path, typer.Option(help="ReXGroundingCT's dataset JSON.")],
    rexgroundingct_masks: Annotated[Path, typer.Option(help="ReXGroundingCT's segmentations.")],
    out: Annotated[Path, typer.Option(help="Folder for <volume>.safetensors.")],
    split: Annotated[Literal["train", "valid"], typer.Option(help="Split to label.")] = "valid",
    totalsegmentator: CTRateMaps = None,
    grid: Annotated[
        int, typer.Option(help="Patches along a side of the cropped image: 256 / 16, or 252 / 14.", min=1)
    ] = 16,
    limit: FirstVolumes = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Count which organs and findings every patch shows, through the body crop of the image.

    Only scans that ReXGroundingCT annotated and that have a label map are labelled. Existing labels are kept.
    ``volumes.csv`` beside them lists the labelled volumes: --subset_csv of the encoder bundles.
    """
    annotations = read_annotations(rexgroundingct, rexgroundingct_masks)
    sources, rejected = find_ct_rate(root, split, totalsegmentator=totalsegmentator, annotations=annotations)
    sources = [source for source in sources if source.rex is not None][:limit]
    if not sources:
        raise ValueError(f"No scan of split '{split}' is annotated by ReXGroundingCT.")
    out.mkdir(parents=True, exist_ok=True)
    with dask_client(scheduler, workers) as client, progress_bars() as progress:
        failed = write_all(client, sources, out.absolute(), grid=grid, progress=progress)
    without = [item for item in rejected if item.volume in annotations] + failed
    labelled = sorted(file.stem for file in out.glob("*.safetensors"))
    with atomic_file(out / "volumes.csv", "w", encoding="utf-8") as table:
        table.writelines(f"{line}\n" for line in ("VolumeName", *labelled))
    for item in without:
        left_out(item.volume, item.detail)
    console.print(f"{len(sources) - len(failed)} volumes labelled in '{out}'.", soft_wrap=True, markup=False)
    if any(map(is_failure, without)):
        raise typer.Exit(1)


def dense_overlay(
    ct: Annotated[Path, typer.Argument(help="CT in HU, in one file.")],
    label_map: Annotated[Path, typer.Argument(help="TotalSegmentator label map of it, in any orientation.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    grid: Annotated[int, typer.Option(help="Patches along a side of the cropped image.", min=1)] = 16,
    size_px: Annotated[int, typer.Option(help="Side of the image.", min=1)] = 256,
    slices: Annotated[int, typer.Option(help="Slices to show, spread over the scan.", min=1)] = 4,
) -> None:
    """Draw the token grid over slices, with patches coloured by label and masks outlined.

    Above: labels through the crop of the image. Below: labels of the whole slice, which lie elsewhere.
    """
    import numpy as np

    from common.ct.files import ct_file, read_grid
    from common.reports.ct_tokens import read_images, spread_slices
    from common.reports.patch_rows import draw_labels
    from common.run.process import write_figure
    from common.transforms.dense_labels import patch_shares
    from common.transforms.slice_strategies import pad_to_square
    from data_prep.sources.totalsegmentator import read_full_label_map

    names = [label.name for label in load_labels("totalsegmentator")]
    scan = ct_file(ct)
    labels = dense_labels_of(SourceVolume(scan.volume, "", scan, ts=label_map), grid)
    ids = pad_to_square(read_full_label_map(label_map, read_grid(scan)), 0)
    chosen = spread_slices(len(ids), slices)
    whole = patch_shares(ids[chosen], (0, 0, ids.shape[1]), grid, len(names)).toarray()
    cropped = labels.shares.toarray().reshape(len(ids), -1)[chosen]
    pixels = np.bincount(ids[chosen].ravel(), minlength=len(names))
    shown = [int(index) for index in pixels[1:].argsort()[::-1][:18] + 1 if pixels[index] > 0]
    rows = [
        (name, part.reshape(len(chosen), grid, grid, len(names))[..., shown])
        for name, part in (("through the image's crop", cropped), ("of the whole slice", whole))
    ]
    images = read_images(ct, size_px).some(chosen)
    write_figure(out, draw_labels(images, rows, ids[chosen], [(index, names[index]) for index in shown]))
