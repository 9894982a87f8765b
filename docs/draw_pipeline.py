"""Draw the README's figure: from a CT volume over a slab and its views to the encoder, and on to the table.

The CT is a synthetic volume of ``data_prep phantom``; slab and views are cut by the code that training uses.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the repository, where this may run from
from common.shards.slab_dataset import slab_num_slices
from common.transforms.multi_crop import GUIDED_BY_REX, RandSlabMultiCrop
from common.transforms.render_views import resize_square
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render

INK, ACCENT, BLUE, SOFT = "#1d2733", "#b3541e", "#2f6f9f", "#5b6b7c"
WINDOW_HU = (-1350, 350)
RECIPE = Path(__file__).resolve().parents[1] / "bundles" / "_recipes" / "lejepa_train.json"
SIZES_PX = (256, 144)


def picture(
    figure: Figure, box: tuple[float, float, float, float], image: np.ndarray, aspect: float = 1
) -> Axes:
    """Show an image in a part of the figure, without axes."""
    axes = figure.add_axes(box)
    axes.imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], aspect=aspect)
    axes.set_axis_off()
    return axes


def block(figure: Figure, centre: tuple[float, float], text: str, colour: str, width: float = 0.13) -> None:
    """Draw a rounded box with text."""
    x, y = centre
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.065),
        width,
        0.13,
        boxstyle="round,pad=0.004,rounding_size=0.012",
        facecolor="white",
        edgecolor=colour,
        linewidth=1.6,
        transform=figure.transFigure,
        mutation_aspect=3.2,
    )
    figure.add_artist(shape)
    figure.text(x, y, text, ha="center", va="center", fontsize=9.5, color=INK, linespacing=1.35)


def arrow(figure: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two points of the figure."""
    figure.add_artist(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=13, color=SOFT, transform=figure.transFigure
        )
    )


def draw_views(figure: Figure, volume: Volume, first: int, length: int) -> None:
    """Draw the views of a slab, 2 global and 8 local ones, as they are cut in training."""
    slab = slice(first, first + length)
    knobs = json.loads(RECIPE.read_text())
    names = inspect.signature(RandSlabMultiCrop).parameters
    crop = RandSlabMultiCrop(**{name: knobs[name] for name in names})
    masks = np.stack([ts[:: len(ts) // 128, :: len(ts) // 128][:128, :128] for ts in volume.ts[slab]])
    plan = crop.draw(np.random.default_rng(5), length, volume.hu.shape[1:], masks, None)
    places = [(0.405, 0.56, 0.072, 0.23), (0.482, 0.56, 0.072, 0.23)]
    places += [(0.405 + 0.0385 * (k % 4), 0.43 - 0.125 * (k // 4), 0.0355, 0.115) for k in range(8)]
    for number, (place, (z, top, left, side)) in enumerate(zip(places, plan.boxes.tolist(), strict=True)):
        pixels = volume.hu[first + z, top : top + side, left : left + side]
        axes = picture(figure, place, resize_square(pixels, SIZES_PX[number >= 2]))
        guided = plan.guide[number] not in (0, GUIDED_BY_REX)
        colour = ACCENT if guided else SOFT
        axes.add_patch(
            Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2)
        )


def main(
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("docs/pipeline.png"),
) -> None:
    """Draw the pipeline.

    Example: python docs/draw_pipeline.py
    """
    volume = render(roster(8, seed=4)[1], "a", 256, (2.0, 2.0))
    dz, pixel_mm = volume.protocol.slice_mm, volume.protocol.pixel_mm
    length = slab_num_slices(dz, 12.0, "phantom")
    first = int(len(volume.hu) * 0.55)
    figure = Figure(figsize=(13, 4.1), facecolor="white")
    coronal = volume.hu[::-1, volume.hu.shape[1] // 2 - 8]
    axes = picture(figure, (0.012, 0.2, 0.155, 0.62), coronal, aspect=dz / pixel_mm)
    band = len(volume.hu) - first - length
    axes.add_patch(
        Rectangle((-0.5, band - 0.5), coronal.shape[1], length, color=ACCENT, alpha=0.55, linewidth=0)
    )
    for number in range(length - 1, -1, -1):
        shift = 0.011 * number
        picture(figure, (0.218 + shift, 0.3 + 2.2 * shift, 0.098, 0.31), volume.hu[first + number])
    draw_views(figure, volume, first, length)
    for x, text in (
        (0.09, "CT volume"),
        (0.297, f"slab: 12 mm, {length} slices"),
        (0.48, "2 global and 8 local views"),
    ):
        figure.text(x, 0.88, text, ha="center", fontsize=11, color=INK, weight="bold")
    figure.text(0.48, 0.2, "orange: centred on an organ or finding", ha="center", fontsize=8.5, color=ACCENT)
    figure.text(0.09, 0.1, "synthetic", ha="center", fontsize=8.5, color=SOFT)
    block(figure, (0.645, 0.53), "slice encoder\nViT-L/16, from scratch", BLUE)
    block(figure, (0.815, 0.77), "CLS: LeJEPA\ninvariance + SIGReg", ACCENT, 0.15)
    block(figure, (0.815, 0.53), "CLS and patches:\norgans, findings (1S, 2S)", ACCENT, 0.15)
    block(figure, (0.815, 0.24), "frozen: one embedding\na slice, feet to head", BLUE, 0.15)
    block(figure, (0.95, 0.24), "20 probes\nTable III", BLUE, 0.075)
    for start, end in (
        ((0.172, 0.5), (0.215, 0.5)),
        ((0.378, 0.5), (0.402, 0.5)),
        ((0.558, 0.53), (0.578, 0.53)),
        ((0.713, 0.56), (0.737, 0.75)),
        ((0.713, 0.53), (0.737, 0.53)),
        ((0.713, 0.5), (0.737, 0.27)),
        ((0.893, 0.24), (0.91, 0.24)),
    ):
        arrow(figure, start, end)
    figure.text(0.815, 0.9, "pretraining", ha="center", fontsize=9.5, color=ACCENT)
    figure.text(0.815, 0.1, "evaluation", ha="center", fontsize=9.5, color=BLUE)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)
