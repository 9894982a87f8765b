"""One CT as a model reads it: an HTML page with a slice viewer."""

# S slices, R of a reference, H pixels along a side, G patches along a side

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image

from common.networks.mil_probe import without_nan
from common.reports.ct_tokens import PatchMaps, spread_slices
from common.run.process import atomic_file

TEMPLATE = Path(__file__).with_name("ct_report.html")
WINDOWS_HU = {"lung": (-1350.0, 150.0), "mediastinum": (-160.0, 240.0)}
"""Display windows, darkest and brightest HU: the usual -600/1500 and 40/400."""

VIEW_PX, JPEG_QUALITY = 384, 80
APART_MM = 10.0
"""Nearest distance of two slices of large weight, as neighbours look alike. Our choice."""


class Quality(NamedTuple):
    """How well a probe reads a label on its validation volumes: NaN without volumes that have it."""

    auroc: float
    auprc: float
    positives: int
    volumes: int


class Finding(NamedTuple):
    """A label with its probability, the probe's threshold, and its quality where that is known."""

    name: str
    probability: float
    threshold: float
    quality: Quality | None = None


class ChestMap(NamedTuple):
    """What an encoder shows of a CT without a probe, see :func:`common.engines.overview.overview`.

    Args:
        facts: what ``overview.json`` says about the volume.
        alike: cosine of each pair of slices ``(S, S)``; NaN for blank ones.
        reference_hu: slices of the reference in HU ``(R, H, H)``; None without one.
    """

    facts: Mapping[str, Any]
    alike: np.ndarray
    reference_hu: np.ndarray | None


def write_ct_report(
    path: str | Path,
    *,
    title: str,
    hu: np.ndarray,
    spacing_mm: Sequence[float],
    origin: str,
    findings: Sequence[Finding] = (),
    probe: str = "",
    attention: np.ndarray | None = None,
    maps: PatchMaps | None = None,
    tiles: Mapping[int, str] | None = None,
    chest: ChestMap | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write the page. Nothing in it is fetched from elsewhere, and what it shows as text is text.

    Slices are shown as JPEG in two windows, at most ``VIEW_PX`` wide: for looking, not for measuring. The
    page opens at the most attended slice; ``#slice=12`` opens it at another.

    Args:
        path: ``.html`` file.
        title: heading, such as the name of the file.
        hu: canonical axial slices, feet to head, rows anterior to posterior, columns patient right to left.
        spacing_mm: (x, y, z).
        origin: which encoder made it.
        findings: labels in the order to show.
        probe: which probe made them.
        attention: share of each slice in the pooling, adding up to 1; None for none.
        maps: where the encoder looks in each slice; None for none.
        tiles: pictures of some slices, :func:`picture_of`, by their numbers from 0.
        chest: what there is without a probe; None for none.
        warnings: sentences to be read first.

    Shape:
        ``hu (S, H, H)``; ``attention (S,)``.

    Raises:
        ValueError: if shapes do not agree, or attention or maps are no numbers of 0 to 1.
    """
    num_slices = len(hu)
    if hu.ndim != 3 or hu.shape[1] != hu.shape[2] or num_slices == 0:
        raise ValueError(f"hu must be square slices (S, H, H), got {hu.shape}.")
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
        "facts": [f"{num_slices} slices", " x ".join(f"{side:.2f}" for side in spacing_mm) + " mm"],
        "origin": f"{probe} {origin}",
        "warnings": list(warnings),
        "findings": [
            one._asdict()
            | {"called": one.probability >= one.threshold, "quality": one.quality and one.quality._asdict()}
            for one in findings
        ],
        "num_slices": num_slices,
        "side_px": hu.shape[1],
        "z_mm": [round(z * float(spacing_mm[2]), 2) for z in range(num_slices)],
        "start": int(attention.argmax()) if attention is not None else num_slices // 2,
        "attention": None if attention is None else [round(float(share), 6) for share in attention],
        "windows": _in_windows(hu),
        "maps": None if values is None else [_base64((255 * one).round().astype(np.uint8)) for one in values],
        "map_shape": None if values is None else list(values.shape[1:]),
        "map_box": [0, 0, 1, 1] if maps is None else list(maps.box),
        "map_note": "" if maps is None else maps.note,
        "tiles": list((tiles or {}).items()),
        "chest": None,
    }
    if chest is not None:
        others = None if chest.reference_hu is None else _in_windows(chest.reference_hu)
        data["chest"] = {**chest.facts, "alike": _heat(chest.alike), "reference_windows": others}
    # a "</script>" in a file's name must not end the script; JSON may escape any character
    text = json.dumps(without_nan(data), allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("<title>CT report</title>", f"<title>{html.escape(title)}</title>")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(page.replace("@@DATA@@", text))


def _in_windows(hu: np.ndarray) -> dict[str, list[str]]:
    return {name: [jpeg_of(hu_slice, *ends) for hu_slice in hu] for name, ends in WINDOWS_HU.items()}


def _heat(cosines: np.ndarray) -> str:
    """Colour cosines ``(S, S)``, the first row at the bottom, over so many pixels that JPEG blurs none."""
    times = math.ceil(VIEW_PX / 2 / len(cosines))
    colours = colormaps["magma"]((cosines[::-1] + 1) / 2)[..., :3]
    return picture_of(colours.repeat(times, axis=0).repeat(times, axis=1))


def jpeg_of(hu_slice: np.ndarray, darkest_hu: float, brightest_hu: float) -> str:
    """Return a slice ``(H, W)`` as a ``data:`` address, black at ``darkest_hu``, white at the brightest."""
    return picture_of((hu_slice.astype(np.float32) - darkest_hu) / (brightest_hu - darkest_hu))


def picture_of(values: np.ndarray) -> str:
    """Return values of 0 to 1, grey ``(H, W)`` or RGB ``(H, W, 3)``, as a ``data:`` address of a JPEG."""
    image = Image.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))
    if max(image.size) > VIEW_PX:
        size = min(image.width, VIEW_PX), min(image.height, VIEW_PX)
        image = image.resize(size, Image.Resampling.BOX)
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
