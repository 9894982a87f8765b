"""A CT as an encoder bundle sees it, with the tokens it makes: what the picture commands share."""

# S slices, I side of an image, P = G * G patches of a slice in row-major order, D embedding

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from monai.bundle import ConfigParser
from torch import nn

from common.embeddings.sources import ct_sources
from common.networks.encoder import cls_and_patches
from common.transforms.body_crop import CropBodyd, body_box
from common.transforms.hounsfield import HUWindow, normalize_hu

SHOWN_HU = (-1000.0, 400.0)
"""Grey values of pictures, black to white: air to soft tissue, with lungs in between. Our choice."""

SLICES_PER_BATCH = 32
PAPER_PX = 256


class Encoder(NamedTuple):
    """A slice encoder and what its input must be.

    Args:
        name: of the bundle.
        network: timm VisionTransformer in evaluation mode.
        window: clip range and statistics in HU.
        size_px: side of its images.
        patch_size_px: side of a patch.
        slice_axes: ``yx``, or ``xy`` for slices transposed.
    """

    name: str
    network: nn.Module
    window: HUWindow
    size_px: int
    patch_size_px: int
    slice_axes: str

    @property
    def grid(self) -> int:
        """Patches along a side, G."""
        return self.size_px // self.patch_size_px


class CTImages(NamedTuple):
    """The slices of a CT through the body crop, as the encoder's images but in HU.

    Args:
        name: of the file.
        hu: float32 ``(S, 1, I, I)``, rows to the back and columns to the left whatever the encoder wants.
        z_mm: position of each slice from the feet, ``(S,)``.
        box: top, left and side of the crop in pixels.
    """

    name: str
    hu: torch.Tensor
    z_mm: np.ndarray
    box: tuple[int, int, int]


class Tokens(NamedTuple):
    """Tokens of slices: ``cls (S, D)``, ``patches (S, G, G, D)``, rows to the back, columns to the left."""

    cls: torch.Tensor
    patches: torch.Tensor


def open_encoder(
    bundle: str | Path,
    weights: str | Path | None = None,
    overrides: Sequence[str | Path] = (),
    size_px: int | None = None,
) -> Encoder:
    """Load an encoder bundle's network by its ``inference.json``.

    Args:
        bundle: folder of the bundle.
        weights: safetensors; those of the bundle by default, "random" for none.
        overrides: further config files, such as demo/inference.json.
        size_px: side of the images; by default the paper's 256, in whole patches.

    Raises:
        FileNotFoundError: if there is no such bundle.
        ValueError: if ``size_px`` is not a multiple of the patch.
    """
    config = Path(bundle) / "configs" / "inference.json"
    if not config.is_file():
        raise FileNotFoundError(f"bundle must hold configs/inference.json, got none in '{bundle}'.")
    parser = ConfigParser()
    parser.read_config([str(path) for path in (config, *overrides)])
    parser["bundle_root"] = str(bundle)
    parser["device"] = "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')"
    if weights is not None:
        parser["encoder_weights"] = None if str(weights) == "random" else str(weights)
    torch.manual_seed(parser["seed"])
    network = parser.get_parsed_content("network").eval()
    patch_size_px = int(parser["patch_size_px"])
    size = size_px or PAPER_PX // patch_size_px * patch_size_px
    if size % patch_size_px or size < patch_size_px:
        raise ValueError(f"size_px must be a multiple of patch_size_px, got {size} and {patch_size_px}.")
    axes, window = parser.get_parsed_content("input")
    return Encoder(parser["name"], network, window, size, patch_size_px, axes)


def read_images(path: str | Path, size_px: int) -> CTImages:
    """Read a CT and crop its slices to the body.

    Args:
        path: NIfTI in HU in any orientation, npz as RAD-ChestCT's, or the folder of a DICOM series.
        size_px: side of the images, I.

    Raises:
        FileNotFoundError: if there is no such file.
        RejectedError: if the file is damaged or no CT in HU.
        ValueError: if the path holds more than one volume.
    """
    sources, rejected = ct_sources(path)
    if len(sources) != 1:
        named = [source.volume for source in sources] + [item.detail for item in rejected]
        raise ValueError(f"ct must be one volume, got {len(sources)} in '{path}': {named[:3]}.")
    ct = sources[0].read()
    hu = torch.from_numpy(ct.hu)[:, None]
    cropped = CropBodyd("image", size_px)({"image": hu})["image"]
    return CTImages(sources[0].volume, cropped, np.arange(len(hu)) * ct.spacing_mm[2], body_box(hu))


@torch.no_grad()
def encode(encoder: Encoder, hu: torch.Tensor) -> Tokens:
    """Run an encoder over slices.

    Args:
        encoder: of :func:`open_encoder`.
        hu: of :func:`read_images`, all slices or some.

    Shape:
        ``hu (S, 1, I, I)``.
    """
    device = next(encoder.network.parameters()).device
    turned = encoder.slice_axes == "xy"
    parts = []
    for chunk in hu.split(SLICES_PER_BATCH):
        images = normalize_hu(chunk.mT if turned else chunk, encoder.window).to(device)
        cls, patches = cls_and_patches(encoder.network, images)
        patches = patches.unflatten(1, (encoder.grid, encoder.grid))
        parts.append((cls.float().cpu(), (patches.transpose(1, 2) if turned else patches).float().cpu()))
    cls, patches = (torch.cat(part) for part in zip(*parts, strict=True))
    return Tokens(cls, patches)


def spread_slices(num_slices: int, count: int) -> list[int]:
    """Choose slices spread evenly over a scan, none at its very ends.

    Args:
        num_slices: of the scan.
        count: how many to choose, at most all.

    Example:
        >>> spread_slices(100, 4)
        [12, 37, 62, 87]
    """
    count = min(count, num_slices)
    return [int((2 * place + 1) * num_slices / (2 * count)) for place in range(count)]


def slices_to_show(asked_for: Sequence[int] | None, num_slices: int, count: int) -> list[int]:
    """Return the slices that were asked for; where none were, some spread over the scan.

    Args:
        asked_for: places from the feet.
        num_slices: of the scan.
        count: how many to choose where none were asked for.

    Raises:
        ValueError: if the scan has no such slice.
    """
    for place in asked_for or ():
        if not 0 <= place < num_slices:
            raise ValueError(f"slices must be 0 to {num_slices - 1} in this scan, got {place}.")
    return list(asked_for or spread_slices(num_slices, count))


def show_slice(axes: Axes, hu: Any, title: str = "") -> None:  # noqa: ANN401 (array or tensor)
    """Draw a slice in grey, without ticks.

    Args:
        axes: to draw on.
        hu: ``(I, I)`` in HU.
        title: above it.
    """
    axes.imshow(np.asarray(hu).squeeze(), cmap="gray", vmin=SHOWN_HU[0], vmax=SHOWN_HU[1])
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)


def overlay(axes: Axes, values: Any, size_px: int, **how: Any) -> Any:  # noqa: ANN401 (array; an AxesImage)
    """Draw one value or colour a patch over a slice.

    Args:
        axes: that shows the slice.
        values: ``(G, G)`` or ``(G, G, 4)``.
        size_px: side of the slice's image.
        how: arguments of ``imshow``.
    """
    extent = (-0.5, size_px - 0.5, size_px - 0.5, -0.5)
    return axes.imshow(np.asarray(values), extent=extent, interpolation="nearest", **how)
