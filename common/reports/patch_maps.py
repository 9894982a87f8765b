"""Where in each slice an encoder looks, as the maps that the page of a CT lays over its slices."""

# S slices, H pixels along a side, G patches along a side

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.embeddings.encoder_bundle import EncoderBundle
from common.reports.ct_tokens import SLICES_PER_BATCH, cls_attention
from common.transforms.slice_strategies import SliceStrategy

FULL_COLOUR = 0.99
"""Quantile of a volume's patches that gets full colour: a few that draw most must not hide the rest. At least
twice the even share, or noise about that would be shown as a map."""


class PatchMaps(NamedTuple):
    """Maps of a volume's slices, as ``write_ct_report`` takes them.

    Args:
        values: ``(S, G, G)``, 0 to 1.
        box: left, top, width and height of what they cover, in shares of a slice.
        note: what they show.
    """

    values: np.ndarray
    box: tuple[float, float, float, float]
    note: str


def cls_attention_maps(
    bundle: EncoderBundle, strategy: SliceStrategy, hu: np.ndarray, box: tuple[int, int, int]
) -> PatchMaps:
    """Return how the attention of each slice's CLS token in the last block is spread over the patches.

    It is the mean over heads. All slices of the volume have one scale: colours compare across slices.

    Args:
        bundle: encoder of slices, a timm VisionTransformer.
        strategy: how slices become its images; one image per slice.
        hu: canonical slices in HU.
        box: top, left and side of the body in pixels, as stored with the embeddings; the whole slice for
            strategies that do not crop.

    Shape:
        ``hu (S, H, H)``.
    """
    region = torch.from_numpy(strategy.region(hu, box))
    device = next(bundle.network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=bundle["amp_dtype"] == "bfloat16"):
        parts = [cls_attention(bundle, strategy(few)).mean(1) for few in region.split(SLICES_PER_BATCH)]
    values, even, full = above_even(torch.cat(parts).numpy())
    note = (
        "Where the encoder looks: patches with more than an even share of the slice's CLS attention (last "
        f"block, mean of heads). No colour: {even:.2%}, which is even, or less; full colour: {full:.2%} or "
        "more, the same in all slices. Not evidence for a finding."
    )
    top, left, side = (pixels / hu.shape[-1] for pixels in box)
    return PatchMaps(values, (left, top, side, side), note)


def above_even(shares: NDArray[np.floating]) -> tuple[NDArray[np.floating], float, float]:
    """Return by how much each patch's share of the attention exceeds an even share, from 0 to 1.

    Args:
        shares: shares of the patches, ``(S, G, G)``.

    Returns:
        Numbers of that shape; the even share, which is 0 of them; and the share that is 1.

    Example:
        >>> values, even, full = above_even(np.array([[[0.25, 0.0], [0.25, 0.5]]]))
        >>> values.round(2).tolist(), even, round(full, 2)
        ([[[0.0, 0.0], [0.0, 1.0]]], 0.25, 0.5)
    """
    even = 1 / shares[0].size
    full = max(float(np.quantile(shares, FULL_COLOUR)), 2 * even)
    return ((shares - even) / (full - even)).clip(0, 1), even, full
