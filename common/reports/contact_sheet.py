"""A picture of training samples: every view as the encoder sees it, with its masks and guidance point."""

import math
from pathlib import Path
from typing import cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from common.reports.slice_grid import class_colours
from common.run.process import write_figure
from common.transforms.hounsfield import HUWindow, normalize_hu
from common.transforms.multi_crop import GUIDED_BY_REX, GUIDED_BY_TS, UNGUIDED, nearest_cells
from common.transforms.render_views import render_views
from common.transforms.view_batch import Batch, on_device

# B samples, V views (Vg global first, then Vl local), S view size


GUIDES = {UNGUIDED: ("unguided", "0.75"), GUIDED_BY_TS: ("TS", "cyan"), GUIDED_BY_REX: ("ReX", "yellow")}
"""Name and colour of what a view was centred on."""

REX_COLOUR = "red"
TS_OPACITY = 0.18


def contact_sheet(batch: Batch, window: HUWindow, path: str | Path, max_samples: int = 4) -> None:
    """Draw the views of a batch's first samples and write a PNG.

    One band per sample: global views large, local views small. Grey values are the encoder's input, gamma and
    blur included. TotalSegmentator classes are tinted, ReX findings outlined; a cross marks the position a
    view was centred on.

    Args:
        batch: with or without masks.
        window: clip range and statistics in HU; its clip range spans black to white.
        path: PNG to write.
        max_samples: most samples drawn.
    """
    on_cpu = on_device(batch, batch, torch.device("cpu"))
    samples = min(len(batch["volume"]), max_samples)
    num_global = batch["num_global"]
    columns = math.ceil((batch["boxes"].shape[1] - num_global) / 2)
    size = (2 * 1.9 * num_global + 1.9 * columns, 4.3 * samples + 0.4)
    figure = Figure(figsize=size, facecolor="black")
    top = 1 - 0.4 / size[1]
    bands = figure.add_gridspec(samples, 1, left=0.005, right=0.995, bottom=0.005, top=top, hspace=0.03)
    images = [view.squeeze(2).transpose(0, 1).numpy() for view in render_views(on_cpu, window)]
    black, white = normalize_hu(torch.tensor([window.min_hu, window.max_hu]), window).tolist()
    for sample in range(samples):
        cells = bands[sample].subgridspec(
            3, 2 * num_global + columns, height_ratios=(0.13, 1, 1), hspace=0.13, wspace=0.03
        )
        title = figure.add_subplot(cells[0, :])
        title.axis("off")
        title.text(0, 0.75, _sample_title(on_cpu, sample), color="white", fontsize=12, va="center")
        for view, image in enumerate(one[sample] for group in images for one in group):
            row, column = divmod(view - num_global, max(columns, 1))
            place = cells[1:, 2 * view : 2 * view + 2] if row < 0 else cells[1 + row, 2 * num_global + column]
            axes = figure.add_subplot(place)
            axes.imshow(image, cmap="gray", vmin=black, vmax=white)
            _draw_masks(axes, on_cpu, sample, view)
            _draw_guide(axes, on_cpu, sample, view)
    look = {"frameon": False, "labelcolor": "white", "borderaxespad": 0.2, "fontsize": 10}
    figure.legend(handles=_legend(), loc="upper right", ncols=5, **look)
    write_figure(path, figure, dpi=110)


def _sample_title(batch: Batch, sample: int) -> str:
    first, centre = int(batch["first_slice"][sample]), int(batch["boxes"][sample, 0, 0])
    last_used = int(batch["boxes"][sample, :, 0].max())
    spacing = " x ".join(f"{float(mm):.2f}" for mm in batch["spacing_mm"][sample])
    sources = [name for name, key in (("TS", batch["has_ts"]), ("ReX", batch["has_rex"])) if key[sample]]
    return (
        f"{batch['volume'][sample]}   slab from slice {first}, centre +{centre}, last used +{last_used}   "
        f"{spacing} mm   masks: {', '.join(sources) or 'none'}   position {int(batch['position'][sample])}"
    )


def _draw_masks(axes: Axes, batch: Batch, sample: int, view: int) -> None:
    if "ts_planes" not in batch:
        return
    ts = _mask_of(batch, batch["ts_planes"], batch["ts_plane"], sample, view)
    rex = _mask_of(batch, batch["rex_planes"], batch["rex_plane"], sample, view)
    tints = np.concatenate([class_colours(256)[ts], TS_OPACITY * (ts != 0)[..., None]], axis=-1)
    axes.imshow(tints, interpolation="nearest")
    if rex.any():
        axes.contour(rex != 0, levels=[0.5], colors=REX_COLOUR, linewidths=1.2)


def _mask_of(batch: Batch, planes: torch.Tensor, numbers: torch.Tensor, sample: int, view: int) -> np.ndarray:
    """Mask as it lies under a view."""
    plane = planes[int(numbers[sample, view])]
    _, top, left, side = batch["boxes"][sample, view, :, None]
    height, width = batch["shape"][sample, :, None]
    rows, columns = (
        nearest_cells(start, side, _size_of(batch, view), length, len(plane))[0]
        for start, length in ((top, height), (left, width))
    )
    return plane[rows][:, columns.flip(0) if batch["flips"][sample, view] else columns].numpy()


def _draw_guide(axes: Axes, batch: Batch, sample: int, view: int) -> None:
    """Label the view and mark the position it was centred on."""
    guide, num_global = int(batch["guide"][sample, view]), batch["num_global"]
    guided_by, colour = GUIDES[guide]
    z, top, left, side = (int(number) for number in batch["boxes"][sample, view])
    name = f"G{view + 1}" if view < num_global else f"L{view - num_global + 1}"
    label = f"{name}  slice +{z}  {side} px  {guided_by}"
    axes.set_title(label, color=colour, fontsize=10 if view < num_global else 8, pad=2)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(colour)
    if guide != UNGUIDED:
        size = _size_of(batch, view)
        row, column = (
            (float(p) - corner) * size / side
            for p, corner in zip(batch["points"][sample, view], (top, left), strict=True)
        )
        column = size - column if batch["flips"][sample, view] else column
        axes.plot(column - 0.5, row - 0.5, "+", color=colour, markersize=11, markeredgewidth=1.6)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


def _size_of(batch: Batch, view: int) -> int:
    return int(batch["sizes_px"][int(view >= batch["num_global"])])


def _legend() -> list[Line2D | Patch]:
    crosses = [
        Line2D([], [], color=GUIDES[guide][1], label=text, marker="+", linestyle="none", markersize=11)
        for guide, text in (
            (GUIDED_BY_REX, "centred on a ReX finding"),
            (GUIDED_BY_TS, "centred on TS foreground"),
        )
    ]
    organs = Patch(color=class_colours(2)[1], alpha=0.5, label="TS classes")
    return [*crosses, Line2D([], [], color=REX_COLOUR, label="ReX finding"), organs]


class ViewSheet:
    """Draw the first batch: every view with its guidance point and masks.

    Args:
        path: PNG to write.
        hu_window: window the picture is shown in.
    """

    def __init__(self, path: str | Path, hu_window: HUWindow) -> None:
        self.path = path
        self.hu_window = hu_window

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self._draw)

    def _draw(self, engine: Engine) -> None:
        if idist.get_rank() == 0:
            contact_sheet(cast(Batch, engine.state.batch), self.hu_window, self.path)
