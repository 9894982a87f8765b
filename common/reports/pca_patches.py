"""Patch tokens coloured by their first three principal components: what looks alike to an encoder.

``python -m common.reports.pca_patches CT.nii.gz --bundle bundles/dale_ct_2s --out pca.png``
"""

# S slices, G patches along a side, D embedding

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray

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

AIR_HU = -930.0
"""Patches whose mean is below it are air around the body; lungs are above. Our choice."""

OPACITY = 0.7


def pca_colours(patches: torch.Tensor, shown: torch.Tensor | None = None) -> NDArray[np.float64]:
    """Return a colour for every patch: its first three principal components over all of them, as RGB.

    Each component is spread from its 2nd to its 98th percentile; its sign is such that the larger part of the
    variance's third moment is bright, so that colours do not flip between runs.

    Source: the pictures of DINOv2, arXiv:2304.07193.

    Args:
        patches: tokens of the slices shown.
        shown: patches that the components and percentiles are of; None for all.

    Shape:
        ``patches (S, G, G, D)``, ``shown (S, G, G)`` bool. Output: ``(S, G, G, 3)`` in 0..1.
    """
    tokens = patches.flatten(0, 2).double()
    chosen = tokens if shown is None else tokens[shown.flatten()]
    mean = chosen.mean(0)
    _, _, axes = torch.linalg.svd(chosen - mean, full_matrices=False)
    places = (tokens - mean) @ axes[:3].T
    of_chosen = (chosen - mean) @ axes[:3].T
    places = places * torch.where((of_chosen**3).sum(0) < 0, -1.0, 1.0)
    of_chosen = of_chosen * torch.where((of_chosen**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(of_chosen, 0.02, dim=0), torch.quantile(of_chosen, 0.98, dim=0)
    colours = ((places - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    padded = torch.zeros(len(tokens), 3, dtype=torch.float64)
    padded[:, : colours.shape[1]] = colours
    return padded.unflatten(0, patches.shape[:3]).numpy()


def draw_pca(
    path: str | Path, images: CTImages, slices: list[int], patches: torch.Tensor, title: str
) -> None:
    """Draw slices above their patches' colours.

    Args:
        path: PNG to write.
        images: of the CT.
        slices: which are shown.
        patches: their tokens, ``(len(slices), G, G, D)``.
        title: of the picture.
    """
    size = images.hu.shape[-1]
    hu = images.hu[slices]
    body = torch.nn.functional.adaptive_avg_pool2d(hu, patches.shape[1])[:, 0] > AIR_HU
    colours = pca_colours(patches, body)
    figure = Figure(figsize=(2.4 * len(slices), 5.2), layout="constrained")
    grid = figure.subplots(2, len(slices), squeeze=False)
    for column, place in enumerate(slices):
        show_slice(grid[0, column], hu[column], f"slice {place}, {images.z_mm[place]:.0f} mm")
        show_slice(grid[1, column], hu[column])
        shown = np.concatenate([colours[column], body[column].numpy()[..., None] * OPACITY], axis=-1)
        overlay(grid[1, column], shown, size)
    figure.suptitle(title, fontsize=9)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=130)


def main(
    ct: Annotated[Path, typer.Argument(help="NIfTI in HU, npz, or a folder of a DICOM series.")],
    bundle: Bundle,
    out: Out,
    slices: Slices = None,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Colour the patches of slices by their first three principal components.

    Example: python -m common.reports.pca_patches ct.nii.gz --bundle bundles/dale_ct_2s --out pca.png
    """
    short_errors()
    encoder = open_encoder(bundle, weights, overrides or (), size_px)
    images = read_images(ct, encoder.size_px)
    chosen = slices_to_show(slices, len(images.hu), 6)
    tokens = encode(encoder, images.hu[chosen])
    title = f"{images.name}: patch tokens of {encoder.name}, first three principal components as colours"
    draw_pca(out, images, chosen, tokens.patches, title)


if __name__ == "__main__":
    typer.run(main)
