"""Pictures that prove dense labels lie where the image shows them: the token grid over CT with its labels."""

# S slices, H side of the padded slice, I side of an image, G patches along a side, C classes

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from common.reports.ct_tokens import CTImages, overlay, show_slice
from common.run.atomic_file import atomic_file

OPACITY = 0.65


def colours_of(count: int) -> NDArray[np.float64]:
    """Return colours of as many classes, hues a golden ratio apart so that neighbours differ, ``(count, 3)``.

    Args:
        count: of classes.
    """
    return np.array([colorsys.hsv_to_rgb(index * 0.618 % 1, 0.9, 1.0) for index in range(count)])


def patch_colours(shares: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the colour of each patch: that of its largest class, the more opaque the more of it there is.

    Args:
        shares: of the classes shown, without the background.

    Shape:
        ``(G, G, C)``. Output: RGBA ``(G, G, 4)``.

    Example:
        >>> patch_colours(np.array([[[0.0, 0.5], [0.0, 0.0]]]))[0, :, 3].tolist()
        [0.325, 0.0]
    """
    largest = shares.argmax(-1)
    strength = OPACITY * shares.max(-1)
    return np.concatenate([colours_of(shares.shape[-1])[largest], strength[..., None]], axis=-1)


def draw_overlay(
    path: str | Path,
    images: CTImages,
    slices: Sequence[int],
    labelled: Sequence[tuple[str, NDArray[np.floating]]],
    mask: NDArray[np.integer],
    classes: Sequence[tuple[int, str]],
) -> None:
    """Draw slices as the encoder sees them, with the outlines of organs and, a row each, labels of patches.

    Outlines are the mask through the crop of the image, pixel by pixel, and labels the shares that were
    counted: colours must fill the outlines, and outlines follow what the CT shows.

    Args:
        path: PNG to write.
        images: of the CT.
        slices: which are shown.
        labelled: a row's name and the shares ``(len(slices), G, G, C)`` of the classes shown.
        mask: ids of the slices shown, in slices padded to squares, ``(len(slices), H, H)``.
        classes: id and name of the classes shown.
    """
    top, left, side = images.box
    size = images.hu.shape[-1]
    colours = colours_of(len(classes))
    figure = Figure(figsize=(3.1 * len(slices), 3.25 * len(labelled) + 0.7), layout="constrained")
    grid = figure.subplots(len(labelled), len(slices), squeeze=False)
    for row, (name, shares) in zip(grid, labelled, strict=True):
        row[0].set_ylabel(name, fontsize=9)
        for column, (axes, place) in enumerate(zip(row, slices, strict=True)):
            show_slice(axes, images.hu[place], f"slice {place}, {images.z_mm[place]:.0f} mm")
            overlay(axes, patch_colours(shares[column]), size)
            _draw_grid(axes, shares.shape[1], size)
            cropped = mask[column, top : top + side, left : left + side]
            centres = (np.arange(side) + 0.5) * size / side - 0.5
            for colour, (index, _) in zip(colours, classes, strict=True):
                shown = cropped == index
                if shown.any():
                    axes.contour(centres, centres, shown, levels=[0.5], colors=[colour], linewidths=1.0)
            axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
    handles = [Patch(color=colour, label=name) for colour, (_, name) in zip(colours, classes, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    figure.suptitle(f"{images.name}: patches coloured by their labels, masks outlined", fontsize=10)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def _draw_grid(axes: Axes, grid: int, size_px: int) -> None:
    for edge in np.arange(1, grid) * size_px / grid - 0.5:
        axes.axhline(edge, color="white", linewidth=0.3, alpha=0.5)
        axes.axvline(edge, color="white", linewidth=0.3, alpha=0.5)
