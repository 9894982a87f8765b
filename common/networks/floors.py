"""Floors for any encoder: grey values, nothing learned. Called as a timm ViT is."""

# N images, P patches of one, D embedding

import torch
from torch import nn
from torch.nn import functional

from common.transforms.hounsfield import HUWindow


class GreyValues(nn.Module):
    """Describes an image, and each patch of it, by its grey values alone.

    Args:
        patch_size_px: side of a patch.

    Shape:
        Input ``(N, 1, H, W)``, sides multiples of ``patch_size_px``. A call gives ``(N, D)``,
        ``forward_features`` ``(N, 1 + P, D)``: the image first, as a CLS token.
    """

    num_prefix_tokens = 1

    def __init__(self, patch_size_px: int) -> None:
        super().__init__()
        self.patch_size_px = patch_size_px

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Describe images and their patches, row-major; see the class."""
        side = self.patch_size_px
        patches = functional.unfold(images, side, stride=side).transpose(1, 2).reshape(-1, 1, side, side)
        return torch.cat([self(images)[:, None], self(patches).unflatten(0, (len(images), -1))], dim=1)


class IntensityHistogram(GreyValues):
    """The share of pixels in each of D bins of equal width over an HU window.

    Args:
        patch_size_px: side of a patch.
        window: HU window that the images were normalized by.
        num_bins: D. Our choice.

    Example:
        >>> hu = torch.tensor([-1000.0, -1000.0, 40.0, 1000.0]).reshape(1, 1, 2, 2)
        >>> IntensityHistogram(2, HUWindow(-1000, 1000, 0, 1), num_bins=4)(hu)
        tensor([[0.5000, 0.0000, 0.2500, 0.2500]])
    """

    def __init__(self, patch_size_px: int, window: HUWindow, num_bins: int) -> None:
        super().__init__(patch_size_px)
        self.window, self.num_bins = window, num_bins

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Count; see the class."""
        low, high, mean, std = self.window
        bins = ((images.flatten(1).float() * std + mean - low) / (high - low) * self.num_bins).long()
        rows = torch.arange(len(bins), device=bins.device)[:, None] * self.num_bins
        places = (rows + bins.clamp(0, self.num_bins - 1)).flatten()
        counts = torch.bincount(places, minlength=len(bins) * self.num_bins)
        return counts.reshape(-1, self.num_bins) / bins.shape[1]


class Pixels(GreyValues):
    """The image itself, averaged down to ``side_px`` x ``side_px`` pixels: D is their number.

    There is no PCA: with all components it only turns the axes, which changes no linear probe that gradient
    descent trains, and fitting one would take a pass over the training slices.
    """

    def __init__(self, patch_size_px: int, side_px: int) -> None:
        super().__init__(patch_size_px)
        self.side_px = side_px

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Average; see the class."""
        return functional.adaptive_avg_pool2d(images.float(), self.side_px).flatten(1)
