"""Encoders of colour images as encoders of CT slices: three channels are made of the grey one."""

# N images, I side of an image

from collections.abc import Sequence

import torch
from torch import nn

from common.transforms.hounsfield import HUWindow


def takes_grey(
    encoder: nn.Module,
    window: HUWindow,
    mean: Sequence[float],
    std: Sequence[float],
    channel_windows: Sequence[Sequence[float]] | None = None,
) -> nn.Module:
    """Let an encoder with three input channels take normalized slices ``(N, 1, I, I)``.

    In front of its patch embedding, each channel is a window of HU scaled to 0 to 1, then z-scored as the
    encoder's images were. Names and shapes of its weights stay as they are.

    Args:
        encoder: timm model with a ``patch_embed``.
        window: how the slices are normalized, as of the bundle. It must contain the channels' windows, since
            what it clips is lost.
        mean: of each channel of the encoder's images, in 0 to 1.
        std: likewise.
        channel_windows: lowest and highest HU of each channel; None for those of ``window`` three times.

    Returns:
        The same encoder.

    Raises:
        ValueError: if there are not three channels, or a window is empty or reaches beyond ``window``.
    """
    whole = window.min_hu, window.max_hu
    windows = [whole] * 3 if channel_windows is None else [(low, high) for low, high in channel_windows]
    if not len(windows) == len(mean) == len(std) == 3:
        raise ValueError(
            f"channel_windows, mean and std must have 3 entries, got {len(windows)}, {len(mean)}, {len(std)}."
        )
    for low, high in windows:
        if not whole[0] <= low < high <= whole[1]:
            raise ValueError(f"channel_windows must rise within {list(whole)} HU, got {[low, high]}.")
    numbers = torch.tensor([[*of, *norm] for of, *norm in zip(windows, mean, std, strict=True)])
    low_hu, high_hu, centre, spread = numbers.T.reshape(4, 3, 1, 1)
    width = high_hu - low_hu
    patch_embed = encoder.get_submodule("patch_embed")
    parts = {"scale": window.std_hu / width, "shift": (window.mean_hu - low_hu) / width}
    for name, values in {**parts, "centre": centre, "spread": spread}.items():
        patch_embed.register_buffer(f"grey_{name}", values.clone(), persistent=False)
    patch_embed.register_forward_pre_hook(_to_rgb)
    return encoder


def _to_rgb(patch_embed: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Make three channels ``(N, 3, I, I)`` of one."""
    scale, shift, centre, spread = (
        patch_embed.get_buffer(f"grey_{name}") for name in ("scale", "shift", "centre", "spread")
    )
    return (((inputs[0] * scale + shift).clamp(0, 1) - centre) / spread,)
