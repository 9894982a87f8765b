"""The slices of a CT that weigh most in a probe's pooling, on one picture."""

# S slices, H pixels along a side

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.reports.ct_report import WINDOWS_HU
from common.reports.ct_tokens import spread_slices
from common.run.process import atomic_file

COLUMNS = 3
APART_MM = 10.0
"""Nearest distance of two slices on the picture, for neighbours look alike. Our choice."""


def attended_slices(attention: np.ndarray, z_mm: Sequence[float], count: int = 6) -> list[int]:
    """Choose the slices of largest weight, none within ``APART_MM`` of one chosen before.

    Where all weigh the same, as in average pooling, they are spread over the scan.

    Args:
        attention: share of each slice in the pooling; none of a blank one.
        z_mm: height of each slice.
        count: how many, fewer if there are not so many that far apart.

    Shape:
        ``attention (S,)``, ``z_mm (S,)``.

    Returns:
        Their numbers from 0, the largest weight first.

    Example:
        >>> attended_slices(np.array([0.1, 0.5, 0.3, 0.1]), [0, 8, 16, 24], 2)
        [1, 3]
    """
    shown = np.flatnonzero(attention)
    if np.ptp(attention[shown]) < 1e-6 / len(attention):
        return shown[spread_slices(len(shown), count)].tolist()
    chosen: list[int] = []
    for slice_ in np.argsort(-attention, kind="stable").tolist():
        if all(abs(z_mm[slice_] - z_mm[other]) >= APART_MM for other in chosen):
            chosen.append(slice_)
    return chosen[:count]


def write_attended_slices(
    path: str | Path, title: str, hu: np.ndarray, z_mm: Sequence[float], attention: np.ndarray
) -> None:
    """Draw the slices of largest weight in the lung window, each with its number, height and weight.

    Args:
        path: PNG to write.
        title: such as the name of the volume.
        hu: canonical axial slices.
        z_mm: height of each slice.
        attention: share of each slice in the pooling, adding up to 1.

    Shape:
        ``hu (S, H, H)``, ``z_mm (S,)``, ``attention (S,)``.
    """
    chosen = attended_slices(attention, z_mm)
    columns = min(COLUMNS, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=(3.6 * columns, 0.8 + 3.75 * rows), layout="constrained", facecolor="white")
    darkest, brightest = WINDOWS_HU["lung"]
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, slice_ in zip(panels, chosen, strict=False):
        axes.imshow(hu[slice_], cmap="gray", vmin=darkest, vmax=brightest)
        place = f"slice {slice_ + 1} of {len(hu)}, {z_mm[slice_]:.1f} mm"
        axes.set_title(f"{place}, weight {attention[slice_]:.2%}", fontsize=9)
    what = f"Slices of largest weight in the probe's pooling, at least {APART_MM:.0f} mm apart; even: "
    lines = [*textwrap.wrap(title, 34 * columns), *textwrap.wrap(f"{what}{1 / len(hu):.2%}", 46 * columns)]
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.supxlabel("Patient's right is on the left. For research, not for diagnosis.", fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
