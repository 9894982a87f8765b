"""One volume at a glance: axial slices from feet to head, a coronal and a sagittal cut, its masks.

Shapes: Z slices, H rows, W columns, of the volume as it is drawn: reduced to at most 256 pixels a side.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from common.cohort.cohort import load_labels
from common.shards.codec import MASK_SIZE_PX, REX_CODES
from common.shards.index import FIELDS, load_index
from data_prep.shards.slices import read_slices

CT, TS, REX, _ = FIELDS

NUM_AXIAL = 6
TILE_PX = 220
GAP_PX = 4
MAX_SIDE_PX = 256
JPEG_QUALITY = 75

LUNG_WINDOW = (-1350, 150)
SOFT_WINDOW = (-160, 240)
WIDE_WINDOW = (-1000, 700)
"""Black and white in HU: lung and mediastinum as radiologists set them, and one that shows both and bone."""

ORGANS = {
    "lungs": ((60, 140, 255), ("lung_",)),
    "airways and gullet": ((0, 215, 215), ("trachea", "esophagus")),
    "heart and vessels": (
        (255, 60, 60),
        (
            *("heart", "aorta", "pulmonary_vein", "brachiocephalic", "subclavian", "common_carotid"),
            *("atrial", "superior_vena", "inferior_vena", "portal_vein", "iliac_artery", "iliac_vena"),
        ),
    ),
    "liver": ((235, 140, 40), ("liver",)),
    "other abdominal organs": ((70, 200, 80), ()),
    "bones": (
        (250, 225, 90),
        (
            *("sacrum", "vertebrae", "humerus", "scapula", "clavicula", "femur", "hip_", "skull", "rib_"),
            *("sternum", "costal"),
        ),
    ),
    "muscles and nerves": ((185, 110, 220), ("spinal_cord", "gluteus", "autochthon", "iliopsoas", "brain")),
}
"""Group of organs to its colour and how the names of its TotalSegmentator classes begin."""

FINDING_COLOUR = (255, 0, 230)
MARK_COLOUR = (255, 225, 90)
TINT = 0.33


class PictureTask(NamedTuple):
    """A volume to draw: path of its shard's tar, and name."""

    shard: Path
    volume: str


class Picture(NamedTuple):
    """A drawn volume: name, JPEG file, and ReXGroundingCT's findings in words, with their slices."""

    volume: str
    jpeg: bytes
    findings: tuple[str, ...]


class Drawn(NamedTuple):
    """A volume at the size at which it is drawn.

    Args:
        ct: int16 HU ``(Z, H, W)``.
        ts: uint8 ids ``(Z, 128, 128)``; zeros without a label map.
        rex: uint16 bit planes ``(Z, 128, 128)``; zeros where not annotated.
        size_mm: size of the whole volume as (z, y, x).
    """

    ct: np.ndarray
    ts: np.ndarray
    rex: np.ndarray
    size_mm: tuple[float, float, float]


def draw_volume(task: PictureTask) -> Picture:
    """Draw one volume.

    Coronal and sagittal cuts go through the middle of the body, at true proportions, head up. Numbers at
    their sides are those of the axial slices: lung window above, mediastinal window with the masks below.

    Raises:
        OSError: if the shard cannot be read.
        ValueError: if the volume is damaged or not in the shard.
    """
    volume = _read(task)
    chosen = chosen_slices(volume.rex)
    cuts = _cuts(volume, chosen)
    height = 2 * TILE_PX + GAP_PX
    width = sum(cut.width + GAP_PX for cut in cuts) + len(chosen) * (TILE_PX + GAP_PX) - GAP_PX
    sheet = Image.new("RGB", (width, height))
    left = 0
    for cut in cuts:
        sheet.paste(cut, (left, (height - cut.height) // 2))
        left += cut.width + GAP_PX
    for number, z in enumerate(chosen, start=1):
        for row, (window, ts) in enumerate(((LUNG_WINDOW, None), (SOFT_WINDOW, volume.ts[z]))):
            tile = _axial(volume, z, window, ts)
            _write(tile, f"{number}", (4, 2), MARK_COLOUR)
            sheet.paste(tile, (left, row * (TILE_PX + GAP_PX)))
        left += TILE_PX + GAP_PX
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return Picture(task.volume, buffer.getvalue(), _in_words(volume.rex))


def _read(task: PictureTask) -> Drawn:
    index = load_index(task.shard)
    names = index.volume.tolist()
    if task.volume not in names:
        raise ValueError(f"No volume '{task.volume}' in '{task.shard}'.")
    i = names.index(task.volume)
    rows = range(int(index.first_sample[i]), int(index.first_sample[i]) + int(index.num_slices[i]))
    ct = np.stack([_reduced(hu) for hu in read_slices(task.shard, index, CT, rows)])
    masks = np.zeros((2, len(rows), MASK_SIZE_PX, MASK_SIZE_PX), np.uint16)
    for mask, field, present in zip(masks, (TS, REX), (index.slice_has_ts, index.slice_has_rex), strict=True):
        drawn = np.flatnonzero(present[rows.start : rows.stop])
        for z, stored in zip(drawn, read_slices(task.shard, index, field, drawn + rows.start), strict=True):
            mask[z] = stored
    x, y, z = index.spacing_mm[i].tolist()
    size_mm = (z * len(rows), y * int(index.shape[i, 0]), x * int(index.shape[i, 1]))
    return Drawn(ct, masks[0].astype(np.uint8), masks[1], size_mm)


def _reduced(ct: np.ndarray) -> np.ndarray:
    """Average whole blocks of pixels."""
    block = -(-max(ct.shape) // MAX_SIDE_PX)
    rows, columns = (size // block for size in ct.shape)
    blocks = ct[: rows * block, : columns * block].reshape(rows, block, columns, block)
    return blocks.mean((1, 3), dtype=np.float32).astype(np.int16)


def chosen_slices(rex: np.ndarray, number: int = NUM_AXIAL) -> list[int]:
    """Choose axial slices: evenly over the volume, some moved to where a finding is largest.

    Args:
        rex: bit planes ``(Z, 128, 128)``.
        number: slices to choose; a volume of fewer shows all.

    Returns:
        Their positions, from the feet to the head.

    Example:
        >>> rex = np.zeros((100, 128, 128), np.uint16)
        >>> rex[70, :3, :3] = 1
        >>> chosen_slices(rex)
        [8, 25, 42, 58, 70, 92]
    """
    even = ((np.arange(number) + 0.5) * len(rex) / number).round().astype(int).clip(max=len(rex) - 1)
    chosen = dict.fromkeys(even.tolist())
    places = list(chosen)
    moved: set[int] = set()
    for bit in range(len(REX_CODES)):
        area = np.count_nonzero(rex >> bit & 1, axis=(1, 2))
        if area.any() and len(moved) < len(places):
            z = int(area.argmax())
            nearest = min((k for k in range(len(places)) if k not in moved), key=lambda k: abs(places[k] - z))
            places[nearest] = z
            moved.add(nearest)
    return sorted(set(places))


def _cuts(volume: Drawn, chosen: list[int]) -> list[Image.Image]:
    """Coronal and sagittal cut through the middle of the body, at one scale, head up."""
    z_mm, y_mm, x_mm = volume.size_mm
    height = 2 * TILE_PX + GAP_PX
    scale = min(height / z_mm, height / x_mm, height / y_mm)
    tissue = np.argwhere(volume.ct[::4, ::4, ::4] > -500)
    row, column = (4 * tissue.mean(0)[1:]).astype(int) if len(tissue) else np.array(volume.ct.shape[1:]) // 2
    mask_row, mask_column = row * 128 // volume.ct.shape[1], column * 128 // volume.ct.shape[2]
    coronal = (volume.ct[::-1, row], volume.ts[::-1, mask_row], volume.rex[::-1, mask_row])
    sagittal = (
        volume.ct[::-1, :, column],
        volume.ts[::-1, :, mask_column],
        volume.rex[::-1, :, mask_column],
    )
    cuts = []
    for (ct, ts, rex), side_mm, sides in ((coronal, x_mm, "RL"), (sagittal, y_mm, "AP")):
        size = (max(1, round(side_mm * scale)), max(1, round(z_mm * scale)))
        cut = _image(ct, ts, rex, WIDE_WINDOW, size)
        _mark_slices(cut, [1 - (z + 0.5) / len(volume.ct) for z in chosen])
        _write(cut, sides[0], (3, 1))
        _write(cut, sides[1], (cut.width - 13, 1))
        cuts.append(cut)
    return cuts


def _mark_slices(cut: Image.Image, heights: list[float]) -> None:
    """Number the axial slices at the side of a cut, where there is room for it."""
    free = float(cut.height)
    for number, height in enumerate(heights, start=1):
        y = round(height * cut.height)
        for left, right in ((0, 8), (cut.width - 9, cut.width)):
            ImageDraw.Draw(cut).line([(left, y), (right, y)], fill=MARK_COLOUR)
        if y <= free - 8 and cut.height >= 40:
            _write(cut, f"{number}", (11, y - 9), MARK_COLOUR)
            free = y - 8


def _axial(volume: Drawn, z: int, window: tuple[int, int], ts: np.ndarray | None) -> Image.Image:
    _, y_mm, x_mm = volume.size_mm
    scale = TILE_PX / max(y_mm, x_mm)
    size = (max(1, round(x_mm * scale)), max(1, round(y_mm * scale)))
    tile = Image.new("RGB", (TILE_PX, TILE_PX))
    image = _image(volume.ct[z], ts, volume.rex[z], window, size)
    tile.paste(image, ((TILE_PX - size[0]) // 2, (TILE_PX - size[1]) // 2))
    middle = TILE_PX // 2
    for text, place in (("R", (3, middle - 8)), ("L", (TILE_PX - 12, middle - 8))):
        _write(tile, text, place)
    for text, place in (("A", (middle - 5, 1)), ("P", (middle - 5, TILE_PX - 18))):
        _write(tile, text, place)
    return tile


def _image(
    ct: np.ndarray,
    ts: np.ndarray | None,
    rex: np.ndarray,
    window: tuple[int, int],
    size: tuple[int, int],
) -> Image.Image:
    """Draw one plane: grey values in a window, organs tinted, findings outlined."""
    low, high = window
    grey = ((np.clip(ct, low, high).astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
    image = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB"))
    if ts is not None:
        ids = np.asarray(Image.fromarray(ts).resize(size, Image.Resampling.NEAREST))
        tint = TINT * (ids > 0)[..., None]
        image = (image * (1 - tint) + _colours()[ids] * tint).astype(np.uint8)
    finding = Image.fromarray(((rex != 0) * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    inside = np.asarray(finding) > 0
    if inside.any():
        outline = ndimage.binary_dilation(inside, iterations=2) & ~inside
        image = np.where(outline[..., None], np.array(FINDING_COLOUR, np.uint8), image)
    return Image.fromarray(np.ascontiguousarray(image))


def _colours() -> np.ndarray:
    """Colour of every uint8 id: ``(256, 3)``."""
    colours = np.zeros((256, 3), np.float32)
    colours[:] = ORGANS["other abdominal organs"][0]
    for label in load_labels("totalsegmentator"):
        for colour, beginnings in ORGANS.values():
            if label.name.startswith(beginnings):
                colours[label.index] = colour
    return colours


def _write(
    image: Image.Image, text: str, place: tuple[int, int], colour: tuple[int, int, int] = (235, 235, 235)
) -> None:
    font = ImageFont.load_default(14)
    ImageDraw.Draw(image).text(place, text, fill=colour, font=font, stroke_width=1, stroke_fill=(0, 0, 0))


def _in_words(rex: np.ndarray) -> tuple[str, ...]:
    words = []
    for bit, label in enumerate(load_labels("rexgroundingct")):
        slices = np.flatnonzero((rex >> bit & 1).any((1, 2)))
        if len(slices):
            words.append(f"{label.name} ({label.code}), slices {slices[0]} to {slices[-1]}")
    return tuple(words)
