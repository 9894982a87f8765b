"""Where in each slice an encoder looks, as the maps that the page of a CT lays over its slices."""

# S slices, H pixels along a side, G patches along a side

from typing import NamedTuple

import numpy as np
import torch

from common.reports.ct_tokens import SLICES_PER_BATCH, Encoder
from common.reports.similar_patches import cls_attention
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
    encoder: Encoder, strategy: SliceStrategy, hu: np.ndarray, box: tuple[int, int, int], amp_dtype: str
) -> PatchMaps:
    """Return how the attention of each slice's CLS token in the last block is spread over the patches.

    The mean over heads; what goes to CLS and registers is left out. Shown is what exceeds the even share, one
    over the number of patches. All slices of the volume have one scale: colours compare across slices.

    Args:
        encoder: of a timm VisionTransformer; its ``size_px`` is not used.
        strategy: how slices become its images; one image a slice.
        hu: canonical slices in HU.
        box: top, left and side of the body in pixels, as stored with the embeddings; the whole slice for
            strategies that do not crop.
        amp_dtype: "bfloat16" for autocast, "float32" for none, as for the embeddings.

    Shape:
        ``hu (S, H, H)``.
    """
    region = torch.from_numpy(strategy.region(hu, box))
    encoder = encoder._replace(size_px=strategy.side_px(region.shape[-1]))
    device = next(encoder.network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=amp_dtype == "bfloat16"):
        parts = [cls_attention(encoder, strategy(few)).mean(1) for few in region.split(SLICES_PER_BATCH)]
    shares = torch.cat(parts).numpy()
    even = 1 / encoder.grid**2
    full = max(float(np.quantile(shares, FULL_COLOUR)), 2 * even)
    note = (
        "Where the encoder looks: patches with more than an even share of the slice's CLS attention (last "
        f"block, mean of heads). No colour: {even:.2%}, which is even, or less; full colour: {full:.2%} or "
        "more, the same in all slices. Not evidence for a finding."
    )
    top, left, side = (pixels / hu.shape[-1] for pixels in box)
    return PatchMaps(((shares - even) / (full - even)).clip(0, 1), (left, top, side, side), note)
