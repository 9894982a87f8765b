"""``dense-overlay``: a picture that shows whether patch labels lie where the image shows the organs."""

from pathlib import Path
from typing import Annotated

import typer

from common.cohort.cohort import load_labels
from data_prep.dense_labels import dense_labels_of
from data_prep.source_volume import SourceVolume


def dense_overlay(
    ct: Annotated[Path, typer.Argument(help="CT in HU, in one file.")],
    label_map: Annotated[Path, typer.Argument(help="TotalSegmentator label map of it, in any orientation.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    grid: Annotated[int, typer.Option(help="Patches along a side of the cropped image.", min=1)] = 16,
    size_px: Annotated[int, typer.Option(help="Side of the image.", min=1)] = 256,
    slices: Annotated[int, typer.Option(help="Slices to show, spread over the scan.", min=1)] = 4,
) -> None:
    """Draw the token grid over slices, patches coloured by their labels and masks outlined.

    Above: labels through the crop of the image. Below: labels of the whole slice, which lie elsewhere.
    """
    import numpy as np

    from common.ct.files import ct_file, read_grid
    from common.reports.ct_tokens import read_images, spread_slices
    from common.reports.patch_rows import draw_labels
    from common.run.files import write_figure
    from common.transforms.dense_labels import pad_mask_to_square, patch_shares
    from data_prep.totalsegmentator import read_full_label_map

    names = [label.name for label in load_labels("totalsegmentator")]
    scan = ct_file(ct)
    labels = dense_labels_of(SourceVolume(scan.volume, "", scan, ts=label_map), grid)
    ids = pad_mask_to_square(read_full_label_map(label_map, read_grid(scan)))
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
