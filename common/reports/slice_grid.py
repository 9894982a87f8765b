"""Pictures of CT slices in rows, with colours over them, and the palette of all pictures."""

# N slices of a row, I side of an image, G patches along a side

import colorsys
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Colours of curves and bars that colour-blind readers can tell apart. Source: Paul Tol's "bright"."""

SHOWN_HU = (-1000.0, 400.0)
"""Grey values of pictures, black to white: air to soft tissue, with lungs in between. Our choice."""


class Row(NamedTuple):
    """A row of slices in a picture, with a number or a colour over each patch.

    Args:
        hu: slices in HU, arrays or tensors ``(N, I, I)`` or ``(N, 1, I, I)``.
        titles: one above each slice; none by default.
        label: text at the left of the row.
        values: numbers ``(N, G, G)``, or RGBA ``(N, G, G, 4)``; None for slices alone.
        opacity: opacity of the patches, one or ``(N, G, G)``.
        cmap: matplotlib's colours of numbers.
        limits: numbers that have the first and the last colour.
        scale: what the numbers are, beside a bar at the right; no bar by default.
        mark: row and column of a patch with a cross on it.
    """

    hu: ArrayLike
    titles: Sequence[str] = ()
    label: str = ""
    values: ArrayLike | None = None
    opacity: ArrayLike = 1.0
    cmap: str = "inferno"
    limits: tuple[float, float] = (0.0, 1.0)
    scale: str = ""
    mark: tuple[int, int] | None = None


def slice_grid(
    rows: Sequence[Row], title: str, more_columns: int = 0, inches: float = 2.4
) -> tuple[Figure, NDArray[np.object_]]:
    """Draw rows of slices, patches over them in colour.

    Args:
        rows: rows with as many slices each.
        title: above the picture; long ones are broken into lines.
        more_columns: empty panels at the right of each row, for the caller to fill.
        inches: side of a slice.

    Returns:
        The figure and its axes, ``(rows, N + more_columns)``, to draw more on.
    """
    columns = len(np.asarray(rows[0].hu)) + more_columns
    width = inches * columns + 0.9 * any(row.scale for row in rows) + 0.3
    figure = Figure(figsize=(width, (inches + 0.2) * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, panels in zip(rows, grid, strict=True):
        panels[0].set_ylabel(row.label, fontsize=8)
        for place, (axes, hu) in enumerate(zip(panels, np.asarray(row.hu), strict=False)):
            show_slice(axes, hu, row.titles[place] if row.titles else "")
            if row.values is not None:
                _lay_over(axes, row, place, hu.shape[-1])
        if row.scale:
            bar = ScalarMappable(Normalize(*row.limits), row.cmap)
            figure.colorbar(bar, ax=panels, shrink=0.8).set_label(row.scale, fontsize=8)
    figure.suptitle("\n".join(textwrap.wrap(title, int(14 * width))), fontsize=9)
    return figure, grid


def _lay_over(axes: Axes, row: Row, place: int, side_px: int) -> None:
    values, (low, high) = np.asarray(row.values), row.limits
    opacity = np.broadcast_to(np.asarray(row.opacity), values.shape[:3])[place]
    axes.imshow(
        values[place],
        extent=(-0.5, side_px - 0.5, side_px - 0.5, -0.5),
        interpolation="nearest",
        alpha=None if values.ndim == 4 else opacity,
        cmap=row.cmap,
        vmin=low,
        vmax=high,
    )
    if row.mark is not None:
        down, across = ((patch + 0.5) * side_px / values.shape[1] - 0.5 for patch in row.mark)
        axes.plot(across, down, "x", color="black", markersize=7)


def show_slice(axes: Axes, hu: ArrayLike, title: str = "") -> None:
    """Draw a slice in HU, ``(I, I)`` or ``(1, I, I)``, in grey and without ticks."""
    axes.imshow(np.asarray(hu).squeeze(), cmap="gray", vmin=SHOWN_HU[0], vmax=SHOWN_HU[1])
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)
    mark_sides(axes)


def mark_sides(axes: Axes) -> None:
    """Write the patient's right and left, front (A) and back (P) at the sides of a canonical slice."""
    for text, x, y in (("R", 0.04, 0.5), ("L", 0.96, 0.5), ("A", 0.5, 0.96), ("P", 0.5, 0.04)):
        style: dict[str, Any] = {"color": "white", "fontsize": 7, "ha": "center", "va": "center"}
        axes.text(x, y, text, transform=axes.transAxes, **style)


def class_colours(count: int) -> NDArray[np.float64]:
    """Return RGB colours of classes ``(count, 3)``, hues a golden ratio apart so that neighbours differ."""
    return np.array([colorsys.hsv_to_rgb(index * 0.618 % 1, 0.9, 1.0) for index in range(count)])
