"""The views of a whole batch, from the crops that the loader cut to what the encoder sees."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common.transforms.hounsfield import HUWindow
from common.transforms.resize import resize_square, resize_squares
from common.transforms.soft_labels import PatchCells, coverage_fractions, patch_cells

# B slabs, V views, S view size


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


# B slabs, V views of a group (Vg global, Vl local), S their size (S global, s local)


GROUPS = ("global", "local")
VIEW_FIELDS = ("global_pixels", "local_pixels", "boxes", "flips", "gamma", "blur_sigma")
"""What of a batch ``render_views`` reads on the device."""

LABEL_FIELDS = ("shape", "ts_planes", "rex_planes", "ts_plane", "rex_plane", "has_ts", "has_rex")
"""What soft labels are counted from there, and which of them count."""

Labels = Callable[[torch.Tensor, torch.Tensor, PatchCells], tuple[torch.Tensor, torch.Tensor]]


class CutViews(NamedTuple):
    """One group of views of a batch before they are rendered.

    Shape:
        ``pixels`` int16 HU (sum of sides squared,), ``sides_px``, ``flips``, ``gamma``, ``blur_sigma``
        (B, V), all on one device; ``size_px``, ``largest_px`` whole numbers: S, and the largest of
        ``sides_px``.
    """

    pixels: torch.Tensor
    sides_px: torch.Tensor
    flips: torch.Tensor
    gamma: torch.Tensor
    blur_sigma: torch.Tensor
    size_px: int
    largest_px: int


def render_views(batch: Mapping[str, Any], window: HUWindow) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize, mirror, augment and normalise the views of a batch on the device where its tensors are.

    Antialiased resize of each crop, not rounded; mirrored where so drawn; gamma and blur in view pixels
    (``photometric``); z-score. On a GPU each group of views is a few batched kernels and nothing waits for
    them. On the CPU the resize is sparse products, a tenth of the time of dense ones, and a sample is
    finished while its views are in the cache. Both give the same numbers to the precision of float32.

    Args:
        batch: of ``collate_views``, all its tensors on one device.
        window: clip range and statistics in HU.

    Returns:
        Global views float32 ``(B, Vg, 1, S, S)`` and local views ``(B, Vl, 1, s, s)``, without unit.
    """
    render = render_by_sample if batch["boxes"].device.type == "cpu" else render_at_once
    first, second = (render(views, window) for views in cut_views(batch))
    return first, second


def count_labels(
    batch: Mapping[str, Any], patch_size_px: int, rex_labels: Labels
) -> dict[str, dict[str, torch.Tensor]]:
    """Count the soft labels of the views of a batch and of their patches, where its tensors are.

    Args:
        batch: of ``collate_views``, with masks.
        patch_size_px: side of a patch.
        rex_labels: ``finding_presence`` or ``finding_fractions``.

    Returns:
        For "global" and "local": ``ts_cls`` (B, V, 118), ``ts_patch`` (B, V, P, 118), ``rex_cls`` (B, V, 14)
        and ``rex_patch`` (B, V, P, 14), float32, patches in row-major order.
    """
    labels: dict[str, dict[str, torch.Tensor]] = {}
    for place, group in enumerate(GROUPS):
        views = views_of(group, batch["num_global"])
        boxes, flips = batch["boxes"][:, views], batch["flips"][:, views]
        cells = patch_cells(
            boxes.flatten(0, 1),
            flips.flatten(),
            batch["shape"].repeat_interleave(boxes.shape[1], dim=0),
            batch["sizes_px"][place],
            patch_size_px,
            batch["ts_planes"].shape[-1],
            batch["most_cells"][place],
        )
        labels[group] = {}
        for source, count in (("ts", coverage_fractions), ("rex", rex_labels)):
            planes, plane = batch[f"{source}_planes"], batch[f"{source}_plane"][:, views]
            cls, patches = count(planes, plane.flatten(), cells)
            labels[group][f"{source}_cls"] = cls.unflatten(0, plane.shape)
            labels[group][f"{source}_patch"] = patches.unflatten(0, plane.shape)
    return labels


def views_of(group: str, num_global: int) -> slice:
    """Return the places of a group's views along the axis of all views, global views first.

    Example:
        >>> views_of("local", num_global=2)
        slice(2, None, None)
    """
    return slice(0, num_global) if group == "global" else slice(num_global, None)


def cut_views(batch: Mapping[str, Any]) -> list[CutViews]:
    """Return the global and the local views of a batch of ``collate_views``."""
    groups = []
    for place, group in enumerate(GROUPS):
        views = views_of(group, batch["num_global"])
        groups.append(
            CutViews(
                pixels=batch[f"{group}_pixels"],
                sides_px=batch["boxes"][:, views, 3],
                flips=batch["flips"][:, views],
                gamma=batch["gamma"][:, views],
                blur_sigma=batch["blur_sigma"][:, views],
                size_px=batch["sizes_px"][place],
                largest_px=batch["largest_px"][place],
            )
        )
    return groups


def render_at_once(views: CutViews, window: HUWindow) -> torch.Tensor:
    """Render a group of views in a few batched kernels, on any device; what GPUs do.

    Args:
        views: to render.
        window: clip range and statistics in HU.

    Returns:
        float32 ``(B, V, 1, S, S)``.
    """
    resized = resize_squares(views.pixels, views.sides_px.flatten(), views.largest_px, views.size_px)
    resized = resized.unflatten(0, views.sides_px.shape)
    resized = torch.where(views.flips[..., None, None], resized.flip(-1), resized)
    return photometric(resized, views.gamma, views.blur_sigma, window)


def render_by_sample(views: CutViews, window: HUWindow) -> torch.Tensor:
    """Render a group of views one sample after the other; what CPUs do.

    Args:
        views: to render.
        window: clip range and statistics in HU.

    Returns:
        float32 ``(B, V, 1, S, S)``.
    """
    batch_size, num_views = views.sides_px.shape
    rendered = torch.empty(batch_size, num_views, 1, views.size_px, views.size_px)
    hu = np.empty((1, num_views, views.size_px, views.size_px), np.float32)
    pixels, sides, flips = views.pixels.numpy(), views.sides_px.tolist(), views.flips.tolist()
    end = 0
    for sample in range(batch_size):
        for view, (side, flip) in enumerate(zip(sides[sample], flips[sample], strict=True)):
            first, end = end, end + side * side
            resized = resize_square(pixels[first:end].reshape(side, side), views.size_px)
            hu[0, view] = resized[:, ::-1] if flip else resized
        gamma, blur_sigma = views.gamma[sample, None], views.blur_sigma[sample, None]
        rendered[sample] = photometric(torch.from_numpy(hu), gamma, blur_sigma, window)[0]
    return rendered
