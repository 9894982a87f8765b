"""Hounsfield windows: the clip range and z-score of every encoder."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


class HUWindow(NamedTuple):
    """Clip range and z-score statistics, all in HU."""

    min_hu: float
    max_hu: float
    mean_hu: float
    std_hu: float


HU_WINDOWS: dict[str, HUWindow] = {
    "ct_rate": HUWindow(-997.0, 888.0, -142.39, 360.97),
    "dale_ct_0_l": HUWindow(-940.8, 923.1, -25.03, 246.87),
}
"""Statistics of foreground voxels (clip: 0.5 and 99.5 percentiles): of 1,000 CT-RATE scans, and of
DALE-CT-0-L's data.

Source: released configurations of DALE-CT; the paper's III-A lost the numbers.
"""


def hu_window(hu_window: str | Sequence[float]) -> HUWindow:
    """Look a window up by name, or check four numbers given in its place.

    Args:
        hu_window: key of ``HU_WINDOWS``, or minimum, maximum, mean and standard deviation in HU.

    Raises:
        KeyError: if no window has that name.
        ValueError: if there are not four finite numbers, the range is empty or the deviation not positive.
    """
    if isinstance(hu_window, str):
        if hu_window not in HU_WINDOWS:
            raise KeyError(
                f"hu_window must be one of {sorted(HU_WINDOWS)} or four numbers, got '{hu_window}'."
            )
        return HU_WINDOWS[hu_window]
    values = [float(value) for value in hu_window]
    if len(values) != 4 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"hu_window must be four finite numbers (min, max, mean, std) in HU, got {values}.")
    window = HUWindow(*values)
    if window.min_hu >= window.max_hu:
        raise ValueError(f"min_hu must be below max_hu, got {window.min_hu} and {window.max_hu}.")
    if window.std_hu <= 0:
        raise ValueError(f"std_hu must be positive, got {window.std_hu}.")
    return window


def normalize_hu(hu: torch.Tensor, window: HUWindow) -> torch.Tensor:
    """Clip to the window and z-score.

    Args:
        hu: HU of any shape and real type.
        window: clip range and statistics.

    Returns:
        float32 of the same shape, without unit.
    """
    return (hu.float().clamp(window.min_hu, window.max_hu) - window.mean_hu) / window.std_hu
