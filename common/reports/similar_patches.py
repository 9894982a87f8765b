"""Heat maps of a slice: where its CLS token looks, and which patches are like a chosen one.

``python -m common.reports.similar_patches CT.nii.gz --bundle bundles/dale_ct_2s --out maps.png``
"""

# S slices, G patches along a side, D embedding, N heads, T tokens of a slice

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.reports.ct_tokens import (
    CTImages,
    Encoder,
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
from common.transforms.hounsfield import normalize_hu


@torch.no_grad()
def cls_attention(encoder: Encoder, hu: torch.Tensor) -> torch.Tensor:
    """Return how the CLS token's attention in the last block is spread over the patches, by head.

    Args:
        encoder: of a timm VisionTransformer.
        hu: slices in HU.

    Shape:
        ``hu (S, 1, I, I)``. Output: ``(S, N, G, G)``; what goes to CLS and registers is left out, so that a
        head's sum is at most 1.
    """
    network: Any = encoder.network
    block = network.blocks[-1].attn
    seen: dict[str, torch.Tensor] = {}
    handle = block.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
    try:
        turned = encoder.slice_axes == "xy"
        device = next(network.parameters()).device
        network.forward_features(normalize_hu(hu.mT if turned else hu, encoder.window).to(device))
    finally:
        handle.remove()
    tokens = seen["tokens"]
    qkv = block.qkv(tokens).unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = block.q_norm(qkv[0][..., :1, :]), block.k_norm(qkv[1])
    attention = (query * block.scale @ key.mT).softmax(-1)[..., 0, network.num_prefix_tokens :]
    maps = attention.unflatten(-1, (encoder.grid, encoder.grid)).float().cpu()
    return maps.mT if turned else maps


def similarity_to(patches: torch.Tensor, row: int, column: int) -> NDArray[np.float32]:
    """Return the cosine similarity of every patch of a slice to one of them.

    Args:
        patches: tokens of a slice.
        row: of the chosen patch.
        column: of the chosen patch.

    Shape:
        ``(G, G, D)``. Output: ``(G, G)``.

    Raises:
        ValueError: if there is no such patch.
    """
    grid = len(patches)
    if not (0 <= row < grid and 0 <= column < grid):
        raise ValueError(f"patch must lie in a grid of {grid} x {grid}, got ({row}, {column}).")
    unit = torch.nn.functional.normalize(patches, dim=-1)
    return (unit @ unit[row, column]).numpy()


def draw_maps(
    path: str | Path,
    images: CTImages,
    slices: list[int],
    patches: torch.Tensor,
    attention: torch.Tensor,
    patch: tuple[int, int],
    title: str,
) -> None:
    """Draw slices, the attention of their CLS token and the likeness of their patches to one.

    Args:
        path: PNG to write.
        images: of the CT.
        slices: which are shown.
        patches: their tokens, ``(len(slices), G, G, D)``.
        attention: of :func:`cls_attention`, mean over heads.
        patch: row and column of the chosen patch.
        title: of the picture.
    """
    size = images.hu.shape[-1]
    side = size / patches.shape[1]
    figure = Figure(figsize=(2.5 * len(slices) + 0.6, 7.8), layout="constrained")
    grid = figure.subplots(3, len(slices), squeeze=False)
    for column, place in enumerate(slices):
        for axes in grid[:, column]:
            show_slice(axes, images.hu[place])
        grid[0, column].set_title(f"slice {place}, {images.z_mm[place]:.0f} mm", fontsize=8)
        looks = attention[column].mean(0).numpy()
        overlay(
            grid[1, column], looks, size, cmap="inferno", alpha=0.5, vmin=0, vmax=np.quantile(looks, 0.99)
        )
        likeness = similarity_to(patches[column], *patch)
        last = overlay(grid[2, column], likeness, size, cmap="coolwarm", alpha=0.5, vmin=-1, vmax=1)
        grid[2, column].plot(
            (patch[1] + 0.5) * side - 0.5, (patch[0] + 0.5) * side - 0.5, "x", color="black", markersize=7
        )
    grid[1, 0].set_ylabel("attention of CLS", fontsize=8)
    grid[2, 0].set_ylabel("like the patch at x", fontsize=8)
    figure.colorbar(last, ax=grid[2], shrink=0.8).set_label("cosine similarity", fontsize=8)
    figure.suptitle(title, fontsize=9)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def main(
    ct: Annotated[Path, typer.Argument(help="NIfTI in HU, npz, or a folder of a DICOM series.")],
    bundle: Bundle,
    out: Out,
    patch: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Row and column of the patch to compare with. Default: middle."),
    ] = None,
    slices: Slices = None,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Show where the CLS token of slices looks, and which patches are like a chosen one.

    Example: python -m common.reports.similar_patches ct.nii.gz --bundle bundles/dale_ct_2s --out maps.png
    """
    short_errors()
    encoder = open_encoder(bundle, weights, overrides or (), size_px)
    images = read_images(ct, encoder.size_px)
    chosen = slices_to_show(slices, len(images.hu), 5)
    hu = images.hu[chosen]
    title = f"{images.name}: {encoder.name}, last block's CLS attention (mean of heads) and patch similarity"
    where = patch or (encoder.grid // 2, encoder.grid // 2)
    draw_maps(out, images, chosen, encode(encoder, hu).patches, cls_attention(encoder, hu), where, title)


if __name__ == "__main__":
    typer.run(main)
