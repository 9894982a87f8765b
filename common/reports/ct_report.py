"""One CT as a model reads it: a self-contained HTML page with a slice viewer, probabilities and attention."""

# S slices, H W pixels, R C rows and columns of patches

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.run.process import atomic_file

TEMPLATE = Path(__file__).with_name("ct_report.html")
WINDOWS_HU = {"lung": (-1350.0, 150.0), "mediastinum": (-160.0, 240.0)}
"""Display windows, darkest and brightest HU: the usual -600/1500 and 40/400."""
VIEW_PX = 384
JPEG_QUALITY = 80


class Finding(NamedTuple):
    """A label with its probability, the probe's threshold, and whether the one reaches the other."""

    name: str
    probability: float
    threshold: float

    @property
    def called(self) -> bool:
        """Whether the finding is called present."""
        return self.probability >= self.threshold


def write_ct_report(
    path: str | Path,
    title: str,
    hu: np.ndarray,
    z_mm: Sequence[float],
    facts: Sequence[str],
    origin: str,
    findings: Sequence[Finding] = (),
    attention: np.ndarray | None = None,
    patch_maps: np.ndarray | None = None,
    map_box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    map_note: str = "",
    warnings: Sequence[str] = (),
) -> None:
    """Write the page. Nothing in it is fetched from elsewhere, and what it shows as text is text.

    Slices are shown as JPEG in two windows, at most ``VIEW_PX`` wide: for looking, not for measuring. The
    page opens at the most attended slice; ``#slice=12`` opens it at another.

    Args:
        path: ``.html`` file.
        title: such as the name of the file.
        hu: canonical axial slices, feet to head, rows anterior to posterior, columns patient right to left.
        z_mm: height of each slice.
        facts: a line of facts about the scan.
        origin: which models made it.
        findings: in the order to show.
        attention: share of each slice in the pooling, adding up to 1; None for none.
        patch_maps: a number from 0 to 1 for each patch; None for none.
        map_box: left, top, width and height of the area that the maps cover, in shares of a slice.
        map_note: what the maps show, in a sentence, with what no colour and full colour mean.
        warnings: what to look at first.

    Shape:
        ``hu (S, H, W)``, square slices; ``z_mm (S,)``; ``attention (S,)``; ``patch_maps (S, R, C)``.

    Raises:
        ValueError: if shapes do not agree, or attention or maps are no numbers of 0 to 1.
    """
    num_slices = len(hu)
    if hu.ndim != 3 or hu.shape[1] != hu.shape[2] or num_slices == 0:
        raise ValueError(f"hu must be square slices (S, H, H), got {hu.shape}.")
    if len(z_mm) != num_slices:
        raise ValueError(f"z_mm must have one height a slice, got {len(z_mm)} for {num_slices} slices.")
    for name, values, ndim in (("attention", attention, 1), ("patch_maps", patch_maps, 3)):
        if values is None:
            continue
        if values.ndim != ndim or len(values) != num_slices:
            raise ValueError(
                f"{name} must have one entry a slice, got {values.shape} for {num_slices} slices."
            )
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} must be numbers from 0 to 1, got {values.min()} to {values.max()}.")
    data = {
        "title": title,
        "facts": list(facts),
        "origin": origin,
        "warnings": list(warnings),
        "findings": [finding._asdict() | {"called": finding.called} for finding in findings],
        "num_slices": num_slices,
        "z_mm": [round(float(z), 2) for z in z_mm],
        "start": int(attention.argmax()) if attention is not None else num_slices // 2,
        "attention": None if attention is None else [round(float(share), 6) for share in attention],
        "windows": {name: [jpeg_of(hu_slice, *ends) for hu_slice in hu] for name, ends in WINDOWS_HU.items()},
        "maps": None if patch_maps is None else [_bytes_of(patch_map) for patch_map in patch_maps],
        "map_shape": None if patch_maps is None else list(patch_maps.shape[1:]),
        "map_box": list(map_box),
        "map_note": map_note,
    }
    # a "</script>" in a file's name must not end the script; JSON may escape any character
    text = json.dumps(data).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("<title>CT report</title>", f"<title>{html.escape(title)}</title>")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.write(page.replace("@@DATA@@", text))


def jpeg_of(hu_slice: np.ndarray, darkest_hu: float, brightest_hu: float) -> str:
    """Return a slice in a display window as a ``data:`` address.

    Args:
        hu_slice: HU (H, W).
        darkest_hu: shown black, as is everything below.
        brightest_hu: shown white.
    """
    grey = np.clip((hu_slice.astype(np.float32) - darkest_hu) / (brightest_hu - darkest_hu), 0, 1)
    image = Image.fromarray((255 * grey).round().astype(np.uint8))
    if max(image.size) > VIEW_PX:
        image = image.resize((VIEW_PX, VIEW_PX), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _bytes_of(patch_map: np.ndarray) -> str:
    return base64.b64encode((255 * patch_map).round().astype(np.uint8).tobytes()).decode()
