"""A picture of training samples: every view as the encoder sees it, with its masks and guidance point."""

# B samples, V views (Vg global first, then Vl local), S view size

import colorsys
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.transforms.batch_views import render_views
from common.transforms.hounsfield import HUWindow
from common.transforms.mask_grid import nearest_cells
from common.transforms.multi_crop import GUIDED_BY_REX, GUIDED_BY_TS, UNGUIDED

GUIDE_NAMES = {UNGUIDED: "unguided", GUIDED_BY_TS: "TS", GUIDED_BY_REX: "ReX"}
GUIDE_COLOURS = {UNGUIDED: "0.75", GUIDED_BY_TS: "cyan", GUIDED_BY_REX: "yellow"}
REX_COLOUR = "red"
TS_OPACITY = 0.18


def contact_sheet(batch: Mapping[str, Any], window: HUWindow, path: str | Path, max_samples: int = 4) -> None:
    """Draw the views of a batch's first samples and write a PNG.

    One band a sample: global views large, local views small. Grey values are the encoder's input, gamma and
    blur included. TotalSegmentator classes are tinted, ReX findings outlined; a cross marks the position a
    view was centred on.

    Args:
        batch: of ``collate_views``, with or without masks.
        window: clip range and statistics in HU; its clip range spans black to white.
        path: PNG to write.
        max_samples: most samples drawn.
    """
    num_samples = min(len(batch["volume"]), max_samples)
    num_global, num_views = batch["num_global"], batch["boxes"].shape[1]
    num_local = num_views - num_global
    local_columns = math.ceil(num_local / 2)
    figure = Figure(
        figsize=(2 * 1.9 * num_global + 1.9 * local_columns, 4.3 * num_samples + 0.4), facecolor="black"
    )
    header = 0.4 / figure.get_figheight()
    bands = figure.add_gridspec(
        num_samples, 1, left=0.005, right=0.995, bottom=0.005, top=1 - header, hspace=0.03
    )
    images = _encoder_input(batch, window)
    black_white = tuple((hu - window.mean_hu) / window.std_hu for hu in (window.min_hu, window.max_hu))
    for sample in range(num_samples):
        cells = bands[sample].subgridspec(
            3, 2 * num_global + local_columns, height_ratios=(0.13, 1, 1), hspace=0.13, wspace=0.03
        )
        title = figure.add_subplot(cells[0, :])
        title.axis("off")
        title.text(0, 0.75, _sample_title(batch, sample), color="white", fontsize=12, va="center")
        for view in range(num_views):
            row, column = divmod(view - num_global, local_columns)
            place = cells[1:, 2 * view : 2 * view + 2] if row < 0 else cells[1 + row, 2 * num_global + column]
            axes = figure.add_subplot(place)
            axes.imshow(images[view][sample], cmap="gray", vmin=black_white[0], vmax=black_white[1])
            _draw_masks(axes, batch, sample, view)
            _draw_guide(axes, batch, sample, view)
    figure.legend(
        handles=_legend(),
        loc="upper right",
        ncols=5,
        frameon=False,
        labelcolor="white",
        borderaxespad=0.2,
        fontsize=10,
    )
    figure.savefig(path, format="png", dpi=110)


def _encoder_input(batch: Mapping[str, Any], window: HUWindow) -> list[np.ndarray]:
    """Per view, the batch (B, S, S) after photometric augmentation and normalisation."""
    on_cpu = {name: part.cpu() if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
    groups = render_views(on_cpu, window)
    return [image for views in groups for image in views.squeeze(2).transpose(0, 1).numpy()]


def _sample_title(batch: Mapping[str, Any], sample: int) -> str:
    first, centre = int(batch["first_slice"][sample]), int(batch["boxes"][sample, 0, 0])
    last_used = int(batch["boxes"][sample, :, 0].max())
    spacing = " x ".join(f"{float(mm):.2f}" for mm in batch["spacing_mm"][sample])
    sources = [name for name, key in (("TS", "has_ts"), ("ReX", "has_rex")) if batch[key][sample]]
    return (
        f"{batch['volume'][sample]}   slab from slice {first}, centre +{centre}, last used +{last_used}   "
        f"{spacing} mm   masks: {', '.join(sources) or 'none'}   position {int(batch['position'][sample])}"
    )


def _mask_of(batch: Mapping[str, Any], name: str, sample: int, view: int) -> np.ndarray:
    """Mask ``name`` as it lies under a view."""
    plane = batch[f"{name}_planes"][int(batch[f"{name}_plane"][sample, view])].cpu()
    _, top, left, side = batch["boxes"][sample, view, :, None].cpu()
    height, width = batch["shape"][sample, :, None].cpu()
    rows, columns = (
        nearest_cells(start, side, _size_of(batch, view), length, len(plane))[0]
        for start, length in ((top, height), (left, width))
    )
    return plane[rows][:, columns.flip(0) if batch["flips"][sample, view] else columns].numpy()


def _draw_masks(axes: Axes, batch: Mapping[str, Any], sample: int, view: int) -> None:
    if "ts_planes" not in batch:
        return
    ts, rex = (_mask_of(batch, name, sample, view) for name in ("ts", "rex"))
    axes.imshow(_ts_colours()[ts], interpolation="nearest")
    if rex.any():
        axes.contour(rex != 0, levels=[0.5], colors=REX_COLOUR, linewidths=1.2)


def _draw_guide(axes: Axes, batch: Mapping[str, Any], sample: int, view: int) -> None:
    """Label the view and mark the position it was centred on."""
    guide = int(batch["guide"][sample, view])
    num_global = batch["num_global"]
    z, top, left, side = (int(number) for number in batch["boxes"][sample, view])
    name = f"G{view + 1}" if view < num_global else f"L{view - num_global + 1}"
    label = f"{name}  slice +{z}  {side} px  {GUIDE_NAMES[guide]}"
    axes.set_title(label, color=GUIDE_COLOURS[guide], fontsize=10 if view < num_global else 8, pad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GUIDE_COLOURS[guide])
    if guide != UNGUIDED:
        size = _size_of(batch, view)
        row, column = (
            (float(p) - corner) * size / side
            for p, corner in zip(batch["points"][sample, view], (top, left), strict=True)
        )
        column = size - column if batch["flips"][sample, view] else column
        axes.plot(
            column - 0.5, row - 0.5, "+", color=GUIDE_COLOURS[guide], markersize=11, markeredgewidth=1.6
        )
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


def _size_of(batch: Mapping[str, Any], view: int) -> int:
    return int(batch["sizes_px"][int(view >= batch["num_global"])])


def _ts_colours() -> np.ndarray:
    """RGBA for every uint8 id: hues a golden ratio apart, so that neighbouring ids differ; 0 transparent."""
    hues = (index * 0.618 % 1 for index in range(256))
    colours = np.array([(*colorsys.hsv_to_rgb(hue, 0.9, 1.0), TS_OPACITY) for hue in hues])
    colours[0, 3] = 0
    return colours


def _legend() -> list[Line2D | Patch]:
    crosses = {GUIDED_BY_REX: "centred on a ReX finding", GUIDED_BY_TS: "centred on TS foreground"}
    return [
        *(
            Line2D(
                [], [], color=GUIDE_COLOURS[guide], label=label, marker="+", linestyle="none", markersize=11
            )
            for guide, label in crosses.items()
        ),
        Line2D([], [], color=REX_COLOUR, label="ReX finding"),
        Patch(color=colorsys.hsv_to_rgb(0.618, 0.9, 1.0), alpha=0.5, label="TS classes"),
    ]
