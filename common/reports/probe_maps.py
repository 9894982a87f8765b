"""Maps of a finding's or an organ's probability over a CT, by a linear probe of patch tokens.

``python -m common.reports.probe_maps CT.nii.gz --bundle bundles/dale_ct_2s --probes runs/dale_ct_2s
--name liver --out liver.png``
"""

# S slices, G patches along a side, D embedding, C classes

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from common.embeddings.dense_cohort import TASKS
from common.networks.dense_probe import load_dense_probe
from common.reports.ct_tokens import (
    CTImages,
    encode,
    open_encoder,
    overlay,
    read_images,
    show_slice,
    slices_to_show,
)
from common.reports.options import Bundle, Out, Overrides, SizePx, Slices, Weights
from common.run.atomic_file import atomic_file
from common.run.short_errors import short_errors


def probe_of(probes: str | Path, names: Sequence[str], encoder: str) -> tuple[nn.Linear, list[int]]:
    """Load the patch probe that knows some classes.

    Args:
        probes: output folder of eval_dense_2d.
        names: of findings or of organs.
        encoder: name that the probe must have been trained on.

    Returns:
        The probe, and the classes' places in its output.

    Raises:
        ValueError: if no task knows all the names, or the probe is of another encoder.
    """
    known: list[str] = []
    for task in TASKS:
        layer, card = load_dense_probe(probes, "patch", task)
        known += card["class_names"]
        if set(names) <= set(card["class_names"]):
            if card["encoder"] != encoder:
                raise ValueError(
                    f"probes must be of encoder '{encoder}', got '{card['encoder']}' in '{probes}'."
                )
            return layer, [card["class_names"].index(name) for name in names]
    raise ValueError(f"names must be of one task, among {known}, got {list(names)}.")


@torch.no_grad()
def probabilities(layer: nn.Linear, patches: torch.Tensor, places: Sequence[int]) -> NDArray[np.float32]:
    """Return the probability of classes in every patch.

    Args:
        layer: probe of patch tokens.
        patches: tokens.
        places: of the classes in the probe's output.

    Shape:
        ``patches (S, G, G, D)``. Output: ``(len(places), S, G, G)``.
    """
    return layer(patches)[..., list(places)].sigmoid().movedim(-1, 0).numpy()


def draw_probabilities(
    path: str | Path,
    images: CTImages,
    slices: Sequence[int],
    maps: NDArray[np.float32],
    names: Sequence[str],
    title: str,
) -> None:
    """Draw slices and below them a row a class; the more opaque a patch, the likelier.

    Args:
        path: PNG to write.
        images: of the CT.
        slices: which are shown.
        maps: probabilities ``(len(names), len(slices), G, G)``.
        names: of the classes.
        title: of the picture.
    """
    size = images.hu.shape[-1]
    figure = Figure(figsize=(2.4 * len(slices) + 0.8, 2.5 * (1 + len(names)) + 0.3), layout="constrained")
    grid = figure.subplots(1 + len(names), len(slices), squeeze=False)
    for column, place in enumerate(slices):
        show_slice(grid[0, column], images.hu[place], f"slice {place}, {images.z_mm[place]:.0f} mm")
    for row, (name, of_class) in enumerate(zip(names, maps, strict=True), 1):
        top = float(of_class.max())
        for column, place in enumerate(slices):
            show_slice(grid[row, column], images.hu[place])
            shown = of_class[column]
            last = overlay(
                grid[row, column],
                shown,
                size,
                cmap="inferno",
                vmin=0,
                vmax=top,
                alpha=0.15 + 0.6 * shown / max(top, 1e-9),
            )
        grid[row, 0].set_ylabel(name, fontsize=9)
        figure.colorbar(last, ax=grid[row], shrink=0.8).set_label("probability", fontsize=8)
    figure.suptitle(title, fontsize=9)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def main(
    ct: Annotated[Path, typer.Argument(help="NIfTI in HU, npz, or a folder of a DICOM series.")],
    bundle: Bundle,
    probes: Annotated[Path, typer.Option(help="Output folder of eval_dense_2d, for the same encoder.")],
    name: Annotated[list[str], typer.Option(help="Finding or organ, several times, all of one task.")],
    out: Out,
    slices: Slices = None,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Map the probability of findings or organs over slices of a CT.

    Example: python -m common.reports.probe_maps ct.nii.gz --bundle bundles/dale_ct_2s --probes
    bundles/eval_dense_2d/runs/dale_ct_2s --name liver --out liver.png
    """
    short_errors()
    encoder = open_encoder(bundle, weights, overrides or (), size_px)
    layer, places = probe_of(probes, name, encoder.name)
    images = read_images(ct, encoder.size_px)
    chosen = slices_to_show(slices, len(images.hu), 6)
    maps = probabilities(layer, encode(encoder, images.hu[chosen]).patches, places)
    title = f"{images.name}: linear probe of {encoder.name}'s patch tokens"
    draw_probabilities(out, images, chosen, maps, name, title)


if __name__ == "__main__":
    typer.run(main)
