"""A CT as a slice encoder sees it, with the tokens and the attention that the encoder makes of it."""

# S slices, I side of an image, H side of a slice, G patches along a side, D embedding, N heads

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

from common.embeddings.encoder_bundle import EncoderBundle, open_encoder_bundle
from common.embeddings.work import ct_sources
from common.networks.encoder import cls_and_patches
from common.transforms.hounsfield import normalize_hu
from common.transforms.slice_strategies import SliceStrategy, body_box

SLICES_PER_BATCH = 32

FULL_COLOUR = 0.99
"""Quantile of a volume's patches that gets full colour: a few that draw most must not hide the rest. At least
twice the even share, or noise about that would be shown as a map."""


class CTImages(NamedTuple):
    """The slices of a CT, all or some, through the body crop: as the encoder's images but in HU.

    Args:
        name: name of the volume.
        hu: float32 ``(S, 1, I, I)``, rows to the back and columns to the left whatever the encoder wants.
        z_mm: position of each slice from the feet.
        numbers: number of each slice, from 0 at the feet.
        box: top, left and side of the crop in pixels.
    """

    name: str
    hu: torch.Tensor
    z_mm: np.ndarray
    numbers: np.ndarray
    box: tuple[int, int, int]

    @property
    def titles(self) -> list[str]:
        """Heading of each slice."""
        return [f"slice {number}, {mm:.0f} mm" for number, mm in zip(self.numbers, self.z_mm, strict=True)]

    def some(self, places: Sequence[int]) -> "CTImages":
        """Return some of the slices, by their places."""
        kept = list(places)
        return self._replace(hu=self.hu[kept], z_mm=self.z_mm[kept], numbers=self.numbers[kept])


class PatchMaps(NamedTuple):
    """Maps ``(S, G, G)`` of a volume's slices, 0 to 1, and what they show.

    ``box`` is left, top, width and height of the area that they cover, in shares of a slice.
    """

    values: np.ndarray
    box: tuple[float, float, float, float]
    note: str


def open_slice_encoder(
    folder: str | Path,
    weights: str | Path | None = None,
    overrides: Sequence[str | Path] = (),
    size_px: int | None = None,
) -> EncoderBundle:
    """Open an encoder bundle whose patches can be shown.

    Args:
        folder: folder of the bundle.
        weights: safetensors file; the bundle's own by default, "random" for none.
        overrides: further config files, such as demo/inference.json.
        size_px: side of the images; by default that of the images that the bundle embeds.

    Raises:
        ValueError: if ``size_px`` is not in whole patches, or the encoder is no timm VisionTransformer; and
            errors of ``open_encoder_bundle``.
    """
    knobs: dict[str, Any] = {}
    if weights is not None:
        knobs["encoder_weights"] = None if str(weights) == "random" else str(weights)
    bundle = open_encoder_bundle(folder, overrides, knobs)
    if "strategies" not in bundle:
        raise ValueError(f"bundle must be of an encoder of slices, got '{folder}', an encoder of volumes.")
    if size_px is not None:
        bundle.update({"strategies": [f"cropped_{size_px}"]})
    _ = bundle.side_px  # refuses a side that is not in whole patches before weights are read
    if not isinstance(bundle.network, VisionTransformer):
        kind = type(bundle.network).__name__
        raise ValueError(f"bundle must have a VisionTransformer of timm, got {kind} in '{folder}'.")
    return bundle


def read_images(path: str | Path, size_px: int) -> CTImages:
    """Read a CT and crop its slices to the body.

    Args:
        path: one CT, in any form that encoders read.
        size_px: side of the images, I.

    Raises:
        RejectedError: if the file is damaged or no CT in HU.
        ValueError: if the path holds more than one volume.
    """
    sources, rejected = ct_sources(path)
    if len(sources) != 1:
        named = [source.volume for source in sources] + [item.detail for item in rejected]
        raise ValueError(f"ct must be one volume, got {len(sources)} in '{path}': {named[:3]}.")
    ct = sources[0].read()
    hu = torch.from_numpy(ct.hu)
    box = body_box(hu)
    cropped = SliceStrategy(f"cropped_{size_px}", patch_size_px=1)
    images = torch.cat([cropped(part) for part in cropped.region(hu, box).split(SLICES_PER_BATCH)])
    numbers = np.arange(len(hu))
    return CTImages(sources[0].volume, images, numbers * ct.spacing_mm[2], numbers, box)


@torch.no_grad()
def encode(bundle: EncoderBundle, hu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return CLS tokens ``(S, D)`` and patch tokens ``(S, G, G, D)`` of slices ``(S, 1, I, I)`` in HU.

    Rows of patches run to the back and columns to the left, whatever the encoder is shown.
    """
    grid = hu.shape[-1] // bundle.patch_size_px
    parts = [cls_and_patches(bundle.network, _shown(bundle, part)) for part in hu.split(SLICES_PER_BATCH)]
    cls, patches = (torch.cat(tokens).float().cpu() for tokens in zip(*parts, strict=True))
    patches = patches.unflatten(1, (grid, grid))
    return cls, patches.transpose(1, 2) if bundle.slice_axes == "xy" else patches


@torch.no_grad()
def cls_attention(bundle: EncoderBundle, hu: torch.Tensor) -> torch.Tensor:
    """Return how the CLS token's attention in the last block is spread over the patches, by head.

    Slices ``(S, 1, I, I)`` in HU give ``(S, N, G, G)``; what goes to CLS and registers is left out, so that a
    head's sum is at most 1.
    """
    network: Any = bundle.network
    block, inputs = network.blocks[-1].attn, []
    handle = block.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    try:
        network.forward_features(_shown(bundle, hu))
    finally:
        handle.remove()
    qkv = block.qkv(inputs[0]).unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = block.q_norm(qkv[0][..., :1, :]), block.k_norm(qkv[1])
    attention = (query * block.scale @ key.mT).softmax(-1)[..., 0, network.num_prefix_tokens :]
    grid = hu.shape[-1] // bundle.patch_size_px
    maps = attention.float().cpu().unflatten(-1, (grid, grid))
    return maps.mT if bundle.slice_axes == "xy" else maps


def _shown(bundle: EncoderBundle, hu: torch.Tensor) -> torch.Tensor:
    """Slices in HU as the encoder is shown them, on its device."""
    images = normalize_hu(hu.mT if bundle.slice_axes == "xy" else hu, bundle.window)
    return images.to(next(bundle.network.parameters()).device)


def cls_attention_maps(
    bundle: EncoderBundle, strategy: SliceStrategy, hu: np.ndarray, box: Sequence[int] | None
) -> PatchMaps:
    """Return how the attention of each slice's CLS token in the last block is spread over the patches.

    It is the mean over heads. All slices of the volume have one scale: colours compare across slices.

    Args:
        bundle: encoder of slices, a timm VisionTransformer.
        strategy: how slices become its images, one per slice.
        hu: canonical slices in HU ``(S, H, H)``.
        box: top, left and side of the body in pixels, as stored with the embeddings; None for strategies that
            do not crop.
    """
    top, left, side = box or (0, 0, hu.shape[-1])
    region = strategy.region(torch.from_numpy(hu), (top, left, side))
    device = next(bundle.network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bundle["amp_dtype"] == "bfloat16"):
        parts = [cls_attention(bundle, strategy(few)).mean(1) for few in region.split(SLICES_PER_BATCH)]
    values, even, full = above_even(torch.cat(parts).numpy())
    note = (
        "Where the encoder looks: patches with more than an even share of the slice's CLS attention (last "
        f"block, mean of heads). No colour: {even:.2%}, which is even, or less; full colour: {full:.2%} or "
        "more, the same in all slices. Not evidence for a finding."
    )
    left, top, width, height = (pixels / hu.shape[-1] for pixels in (left, top, side, side))
    return PatchMaps(values, (left, top, width, height), note)


def above_even(shares: NDArray[np.floating]) -> tuple[NDArray[np.floating], float, float]:
    """Return by how much each share ``(S, G, G)`` of the attention exceeds an even share, from 0 to 1.

    With it come the share that is 0 of these, which is the even one, and the share that is 1.

    Example:
        >>> values, even, full = above_even(np.array([[[0.25, 0.0], [0.25, 0.5]]]))
        >>> values.round(2).tolist(), even, round(full, 2)
        ([[[0.0, 0.0], [0.0, 1.0]]], 0.25, 0.5)
    """
    even = 1 / shares[0].size
    full = max(float(np.quantile(shares, FULL_COLOUR)), 2 * even)
    return ((shares - even) / (full - even)).clip(0, 1), even, full


def spread_slices(num_slices: int, count: int) -> list[int]:
    """Choose slices spread evenly over a scan, none at its very ends, all if it has fewer.

    Example:
        >>> spread_slices(100, 4)
        [12, 37, 62, 87]
    """
    count = min(count, num_slices)
    return [int((2 * place + 1) * num_slices / (2 * count)) for place in range(count)]


def slices_to_show(asked_for: Sequence[int] | None, num_slices: int, count: int) -> list[int]:
    """Return the slices that were asked for, from 0 at the feet; where none were, ``count`` over the scan.

    Raises:
        ValueError: if the scan has no such slice.
    """
    for place in asked_for or ():
        if not 0 <= place < num_slices:
            raise ValueError(f"slices must be 0 to {num_slices - 1} in this scan, got {place}.")
    return list(asked_for or spread_slices(num_slices, count))
