"""Photometric augmentation and normalisation of a whole batch of views at once."""

# B slabs, V views, S view size

import numpy as np
import torch
from torch.nn import functional as F

from common.transforms.hounsfield import HUWindow


def photometric(
    views: torch.Tensor, gamma: torch.Tensor, blur_sigma: torch.Tensor, window: HUWindow
) -> torch.Tensor:
    """Clip, apply gamma and a 3 x 3 Gaussian blur on 0..1 intensities, and z-score; no loop over views.

    The drawn numbers come with the sample (see ``RandSlabMultiCrop``), so that this is a pure function, on
    any device. Gamma 1 and sigma 0 leave a view as ``normalize_hu`` makes it.

    Source: DALE-CT III-A; order and 3 x 3 kernel from the released configurations.

    Args:
        views: HU, any real type.
        gamma: exponent of each view's 0..1 intensity.
        blur_sigma: standard deviation of each view's blur in view pixels; 0 for none. Borders are reflected.
        window: clip range and statistics in HU.

    Shape:
        ``views (B, V, S, S)``, ``gamma (B, V)``, ``blur_sigma (B, V)``. Output: float32 ``(B, V, 1, S, S)``.

    Raises:
        ValueError: if the shapes do not agree.

    Example:
        >>> views = torch.full((1, 1, 4, 4), 500, dtype=torch.int16)
        >>> window = HUWindow(0, 1000, 0, 100)
        >>> photometric(views, torch.tensor([[2.0]]), torch.zeros(1, 1), window)[0, 0, 0, 0]
        tensor([2.5000, 2.5000, 2.5000, 2.5000])
    """
    for name, drawn in (("gamma", gamma), ("blur_sigma", blur_sigma)):
        if views.ndim != 4 or drawn.shape != views.shape[:2]:
            raise ValueError(
                f"{name} must have shape (B, V) for views (B, V, S, S), "
                f"got {tuple(drawn.shape)} for {tuple(views.shape)}."
            )
    min_hu, max_hu, mean_hu, std_hu = window
    unit = views.float().clamp(min_hu, max_hu).sub_(min_hu).div_(max_hu - min_hu)
    exponents = gamma.float()[..., None, None]
    if unit.device.type == "cpu":
        np.power(unit.numpy(), exponents.numpy(), out=unit.numpy())  # in half of PyTorch's time
        blurred = blur_sigma > 0  # elsewhere looking which they are would wait for the device
        if blurred.any():
            unit[blurred] = _blur_3x3(unit[blurred], blur_sigma[blurred].float())
    else:
        unit = _blur_3x3(unit.pow_(exponents), blur_sigma.float())
    return unit.mul_((max_hu - min_hu) / std_hu).add_((min_hu - mean_hu) / std_hu).unsqueeze(2)


def _blur_3x3(unit: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Separable blur of (..., S, S) with the kernel (e, 1, e) / (1 + 2 e), e = exp(-1 / (2 sigma^2))."""
    side = torch.exp(-0.5 / sigma.square())  # sigma 0: exp(-inf) = 0, the identity
    centre = 1 / (1 + 2 * side)
    side, centre = (side * centre)[..., None, None], centre[..., None, None]
    rows = _reflected(unit, (0, 0, 1, 1))
    unit = centre * unit + side * (rows[..., :-2, :] + rows[..., 2:, :])
    columns = _reflected(unit, (1, 1, 0, 0))
    return centre * unit + side * (columns[..., :-2] + columns[..., 2:])


def _reflected(unit: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """Pad the last two axes; PyTorch wants two or one before them."""
    images = unit.flatten(0, -3)
    return F.pad(images, padding, mode="reflect").unflatten(0, unit.shape[:-2])
