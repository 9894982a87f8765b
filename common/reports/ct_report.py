"""One CT as a model reads it: an HTML page with a slice viewer, and a picture of its weightiest slices."""

# S slices, H pixels along a side, R C rows and columns of patches

import base64
import html
import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from common.reports.ct_tokens import PatchMaps, spread_slices
from common.run.process import atomic_file

TEMPLATE = Path(__file__).with_name("ct_report.html")
WINDOWS_HU = {"lung": (-1350.0, 150.0), "mediastinum": (-160.0, 240.0)}
"""Display windows, darkest and brightest HU: the usual -600/1500 and 40/400."""

VIEW_PX, JPEG_QUALITY = 384, 80
COLUMNS = 3
APART_MM = 10.0
"""Nearest distance of two slices on the picture, as neighbours look alike. Our choice."""


class Finding(NamedTuple):
    """A label with its probability and the probe's threshold."""

    name: str
    probability: float
    threshold: float


def write_ct_report(
    path: str | Path,
    *,
    title: str,
    hu: np.ndarray,
    z_mm: Sequence[float],
    facts: Sequence[str],
    origin: str,
    findings: Sequence[Finding] = (),
    attention: np.ndarray | None = None,
    maps: PatchMaps | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page. Nothing in it is fetched from elsewhere, and what it shows as text is text.

    Slices are shown as JPEG in two windows, at most ``VIEW_PX`` wide: for looking, not for measuring. The
    page opens at the most attended slice; ``#slice=12`` opens it at another.

    Args:
        path: ``.html`` file.
        title: heading, such as the name of the file.
        hu: canonical axial slices, feet to head, rows anterior to posterior, columns patient right to left.
        z_mm: height of each slice.
        facts: facts about the scan, shown in one line.
        origin: which models made it.
        findings: labels in the order to show.
        attention: share of each slice in the pooling, adding up to 1; None for none.
        maps: where the encoder looks in each slice; None for none.
        warnings: sentences to be read first.

    Shape:
        ``hu (S, H, H)``; ``z_mm (S,)``; ``attention (S,)``.

    Raises:
        ValueError: if shapes do not agree, or attention or maps are no numbers of 0 to 1.
    """
    num_slices = len(hu)
    if hu.ndim != 3 or hu.shape[1] != hu.shape[2] or num_slices == 0:
        raise ValueError(f"hu must be square slices (S, H, H), got {hu.shape}.")
    if len(z_mm) != num_slices:
        raise ValueError(f"z_mm must have {num_slices} heights, one per slice, got {len(z_mm)}.")
    values = None if maps is None else maps.values
    for name, array, ndim in (("attention", attention, 1), ("maps", values, 3)):
        if array is None:
            continue
        if array.ndim != ndim or len(array) != num_slices:
            raise ValueError(f"{name} must have {num_slices} entries, one per slice, got {array.shape}.")
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"{name} must be numbers from 0 to 1, got {array.min()} to {array.max()}.")
    data = {
        "title": title,
        "facts": list(facts),
        "origin": origin,
        "warnings": list(warnings),
        "findings": [one._asdict() | {"called": one.probability >= one.threshold} for one in findings],
        "num_slices": num_slices,
        "z_mm": [round(float(z), 2) for z in z_mm],
        "start": int(attention.argmax()) if attention is not None else num_slices // 2,
        "attention": None if attention is None else [round(float(share), 6) for share in attention],
        "windows": {name: [jpeg_of(hu_slice, *ends) for hu_slice in hu] for name, ends in WINDOWS_HU.items()},
        "maps": None if values is None else [_base64((255 * one).round().astype(np.uint8)) for one in values],
        "map_shape": None if values is None else list(values.shape[1:]),
        "map_box": [0, 0, 1, 1] if maps is None else list(maps.box),
        "map_note": "" if maps is None else maps.note,
    }
    # a "</script>" in a file's name must not end the script; JSON may escape any character
    text = json.dumps(data).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("<title>CT report</title>", f"<title>{html.escape(title)}</title>")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(page.replace("@@DATA@@", text))


def jpeg_of(hu_slice: np.ndarray, darkest_hu: float, brightest_hu: float) -> str:
    """Return a slice ``(H, W)`` as a ``data:`` address, black at ``darkest_hu``, white at the brightest."""
    grey = np.clip((hu_slice.astype(np.float32) - darkest_hu) / (brightest_hu - darkest_hu), 0, 1)
    image = Image.fromarray((255 * grey).round().astype(np.uint8))
    if max(image.size) > VIEW_PX:
        image = image.resize((VIEW_PX, VIEW_PX), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + _base64(file.getvalue())


def _base64(data: bytes | np.ndarray) -> str:
    return base64.b64encode(bytes(data)).decode()


def attended_slices(attention: np.ndarray, z_mm: Sequence[float], count: int = 6) -> list[int]:
    """Choose the slices of largest weight, none within ``APART_MM`` of one chosen before.

    Where all weigh the same, as in average pooling, they are spread over the scan. Their numbers count from
    0, the largest weight comes first, and they are fewer than ``count`` if not so many lie that far apart.

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

    Arguments are those of :func:`write_ct_report`; the file is a PNG.
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
