"""Draw the README's figure: from a CT volume over a slab and its views to the encoder, and on to the table.

The CT is a synthetic volume of ``data_prep phantom``; slab and views are cut by the code that training uses.
"""

import inspect
import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from common.shards.slab_dataset import slab_num_slices
from common.transforms.multi_crop import GUIDED_BY_REX, RandSlabMultiCrop
from common.transforms.render_views import resize_square
from data_prep.phantom.population import roster
from data_prep.phantom.scan import Volume, render

INK, ACCENT, BLUE, SOFT = "#1d2733", "#b3541e", "#2f6f9f", "#5b6b7c"
WINDOW_HU = (-1350, 350)
RECIPE = Path(__file__).resolve().parents[1] / "bundles" / "_recipes" / "lejepa_train.json"
SIZES_PX = (256, 144)
GLOBAL_BOXES = [(0.405, 0.56, 0.072, 0.23), (0.482, 0.56, 0.072, 0.23)]
LOCAL_BOXES = [(0.405 + 0.0385 * (k % 4), 0.43 - 0.125 * (k // 4), 0.0355, 0.115) for k in range(8)]
BLOCKS = [
    (0.645, 0.53, 0.13, BLUE, "slice encoder\nViT-L/16, from scratch"),
    (0.815, 0.77, 0.15, ACCENT, "CLS: LeJEPA\ninvariance + SIGReg"),
    (0.815, 0.53, 0.15, ACCENT, "CLS and patches:\norgans, findings (1S, 2S)"),
    (0.815, 0.24, 0.15, BLUE, "frozen: one embedding\nper slice, feet to head"),
    (0.95, 0.24, 0.075, BLUE, "20 probes\nTable III"),
]
ARROWS = [
    ((0.172, 0.5), (0.215, 0.5)),
    ((0.378, 0.5), (0.402, 0.5)),
    ((0.558, 0.53), (0.578, 0.53)),
    ((0.713, 0.56), (0.737, 0.75)),
    ((0.713, 0.53), (0.737, 0.53)),
    ((0.713, 0.5), (0.737, 0.27)),
    ((0.893, 0.24), (0.91, 0.24)),
]
NOTES = [
    (0.48, 0.2, 8.5, ACCENT, "orange: centred on an organ or finding"),
    (0.09, 0.1, 8.5, SOFT, "synthetic"),
    (0.815, 0.9, 9.5, ACCENT, "pretraining"),
    (0.815, 0.1, 9.5, BLUE, "evaluation"),
]


def picture(
    figure: Figure, box: tuple[float, float, float, float], image: np.ndarray, aspect: float = 1
) -> Axes:
    """Show an image in a part of the figure, without axes."""
    axes = figure.add_axes(box)
    axes.imshow(image, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], aspect=aspect)
    axes.set_axis_off()
    return axes


def draw_blocks(figure: Figure) -> None:
    """Draw the boxes of the encoder and of what uses it, with arrows and notes."""
    for x, y, width, colour, text in BLOCKS:
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
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "color": SOFT, "transform": figure.transFigure}
    for start, end in ARROWS:
        figure.add_artist(FancyArrowPatch(start, end, **look))
    for x, y, size, colour, text in NOTES:
        figure.text(x, y, text, ha="center", fontsize=size, color=colour)


def draw_views(figure: Figure, volume: Volume, first: int, length: int) -> None:
    """Draw the views of a slab, 2 global and 8 local ones, as they are cut in training."""
    slab = slice(first, first + length)
    knobs = json.loads(RECIPE.read_text())
    names = inspect.signature(RandSlabMultiCrop).parameters
    crop = RandSlabMultiCrop(**{name: knobs[name] for name in names})
    masks = np.stack([ts[:: len(ts) // 128, :: len(ts) // 128][:128, :128] for ts in volume.ts[slab]])
    plan = crop.draw(np.random.default_rng(5), length, volume.hu.shape[1:], masks, None)
    boxes = zip(GLOBAL_BOXES + LOCAL_BOXES, plan.boxes.tolist(), strict=True)
    for number, (place, (z, top, left, side)) in enumerate(boxes):
        pixels = volume.hu[first + z, top : top + side, left : left + side]
        axes = picture(figure, place, resize_square(pixels, SIZES_PX[number >= 2]))
        colour = ACCENT if plan.guide[number] not in (0, GUIDED_BY_REX) else SOFT
        frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2)
        axes.add_patch(frame)


def main(out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("docs/pipeline.png")) -> None:
    """Draw the pipeline.

    Example: python -m docs.draw_pipeline
    """
    volume = render(roster(8, seed=4)[1], "a", 256, (2.0, 2.0))
    dz, pixel_mm = volume.protocol.slice_mm, volume.protocol.pixel_mm
    length = slab_num_slices(dz, 12.0, "phantom")
    first = int(len(volume.hu) * 0.55)
    figure = Figure(figsize=(13, 4.1), facecolor="white")
    coronal = volume.hu[::-1, volume.hu.shape[1] // 2 - 8]
    axes = picture(figure, (0.012, 0.2, 0.155, 0.62), coronal, aspect=dz / pixel_mm)
    corner = (-0.5, len(volume.hu) - first - length - 0.5)
    axes.add_patch(Rectangle(corner, coronal.shape[1], length, color=ACCENT, alpha=0.55, linewidth=0))
    for number in range(length - 1, -1, -1):
        shift = 0.011 * number
        picture(figure, (0.218 + shift, 0.3 + 2.2 * shift, 0.098, 0.31), volume.hu[first + number])
    draw_views(figure, volume, first, length)
    heads = {0.09: "CT volume", 0.297: f"slab: 12 mm, {length} slices", 0.48: "2 global and 8 local views"}
    for x, text in heads.items():
        figure.text(x, 0.88, text, ha="center", fontsize=11, color=INK, weight="bold")
    draw_blocks(figure)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)
