"""Renders the crops that the loader cut into what the encoder sees, and counts the labels of its patches."""

# B slabs, V views of a group (Vg global, Vl local), S their size, N crops, K side of the largest crop

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch.nn import functional as F

from common.transforms.hounsfield import HUWindow
from common.transforms.soft_labels import REX_TARGETS, coverage_fractions, patch_cells
from common.transforms.view_batch import Batch

GROUPS = ("global", "local")


class CutViews(NamedTuple):
    """One group of views of a batch before they are rendered.

    ``pixels`` int16 HU (sum of sides squared,); ``sides_px``, ``flips``, ``gamma``, ``blur_sigma`` (B, V);
    whole numbers: ``size_px``, S, and ``largest_px``, the largest of ``sides_px``.
    """

    pixels: torch.Tensor
    sides_px: torch.Tensor
    flips: torch.Tensor
    gamma: torch.Tensor
    blur_sigma: torch.Tensor
    size_px: int
    largest_px: int


def render_views(batch: Batch, window: HUWindow) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize, mirror, augment and normalise the views of a batch on the device where its tensors are.

    Antialiased resize of each crop, not rounded; mirrored where so drawn; gamma and blur in view pixels
    (``photometric``); z-score. On a GPU each group of views is a few batched kernels and nothing waits for
    them. On the CPU the resize is sparse products, a tenth of the time of dense ones, and a few samples are
    finished while their views are in the cache. Both give the same numbers to the precision of float32.

    Args:
        batch: all its tensors on one device.
        window: clip range and statistics in HU.

    Returns:
        Global views float32 ``(B, Vg, 1, S, S)`` and local views ``(B, Vl, 1, s, s)``, without unit.
    """
    render = render_by_sample if batch["boxes"].device.type == "cpu" else render_at_once
    first, second = (render(views, window) for views in cut_views(batch))
    return first, second


def count_labels(batch: Batch, rex_targets: str) -> dict[str, dict[str, torch.Tensor]]:
    """Count the soft labels of the views of a batch and of their patches, where its tensors are.

    Args:
        batch: with masks.
        rex_targets: key of ``REX_TARGETS``.

    Returns:
        For "global" and "local": ``ts_cls`` (B, V, 118), ``ts_patch`` (B, V, P, 118), ``rex_cls`` (B, V, 14)
        and ``rex_patch`` (B, V, P, 14), float32, patches in row-major order.
    """
    sources = (
        ("ts", batch["ts_planes"], batch["ts_plane"], coverage_fractions),
        ("rex", batch["rex_planes"], batch["rex_plane"], REX_TARGETS[rex_targets]),
    )
    labels: dict[str, dict[str, torch.Tensor]] = {}
    for place, (group, views) in enumerate(_groups(batch)):
        boxes, flips = batch["boxes"][:, views], batch["flips"][:, views]
        cells = patch_cells(
            boxes.flatten(0, 1),
            flips.flatten(),
            batch["shape"].repeat_interleave(boxes.shape[1], dim=0),
            size_px=batch["sizes_px"][place],
            patch_size_px=batch["patch_size_px"],
            grid=batch["ts_planes"].shape[-1],
            most_cells=batch["most_cells"][place],
        )
        labels[group] = {}
        for source, planes, numbers, count in sources:
            number = numbers[:, views]
            cls, patches = count(planes, number.flatten(), cells)
            labels[group][f"{source}_cls"] = cls.unflatten(0, number.shape)
            labels[group][f"{source}_patch"] = patches.unflatten(0, number.shape)
    return labels


def cut_views(batch: Batch) -> list[CutViews]:
    """Return the global and the local views of a batch."""
    pixels = (batch["global_pixels"], batch["local_pixels"])
    return [
        CutViews(
            pixels=pixels[place],
            sides_px=batch["boxes"][:, views, 3],
            flips=batch["flips"][:, views],
            gamma=batch["gamma"][:, views],
            blur_sigma=batch["blur_sigma"][:, views],
            size_px=batch["sizes_px"][place],
            largest_px=batch["largest_px"][place],
        )
        for place, (_, views) in enumerate(_groups(batch))
    ]


def _groups(batch: Batch) -> list[tuple[str, slice]]:
    """Names of the groups of views, and their places along the axis of all views."""
    num_global = batch["num_global"]
    return list(zip(GROUPS, (slice(0, num_global), slice(num_global, None)), strict=True))


def render_at_once(views: CutViews, window: HUWindow) -> torch.Tensor:
    """Render a group of views ``(B, V, 1, S, S)`` in a few batched kernels, on any device; what GPUs do."""
    resized = resize_squares(views.pixels, views.sides_px.flatten(), views.largest_px, views.size_px)
    resized = resized.unflatten(0, views.sides_px.shape)
    resized = torch.where(views.flips[..., None, None], resized.flip(-1), resized)
    return photometric(resized, views.gamma, views.blur_sigma, window)


def render_by_sample(views: CutViews, window: HUWindow) -> torch.Tensor:
    """Render a group of views ``(B, V, 1, S, S)`` a few samples at a time, 1 MB of them; what CPUs do."""
    batch_size, num_views = views.sides_px.shape
    side_px, pixels, end = views.size_px, views.pixels.numpy(), 0
    rendered = torch.empty(batch_size, num_views, 1, side_px, side_px)
    at_once = max(1, 2**18 // (num_views * side_px**2))
    for few in (slice(first, first + at_once) for first in range(0, batch_size, at_once)):
        sides, flips = views.sides_px[few].flatten().tolist(), views.flips[few].flatten().tolist()
        hu = np.empty((len(sides), side_px, side_px), np.float32)
        for view, side, flip in zip(hu, sides, flips, strict=True):
            first, end = end, end + side * side
            resized = resize_square(pixels[first:end].reshape(side, side), side_px)
            view[:] = resized[:, ::-1] if flip else resized
        batch = torch.from_numpy(hu).unflatten(0, (-1, num_views))
        rendered[few] = photometric(batch, views.gamma[few], views.blur_sigma[few], window)
    return rendered


def photometric(
    views: torch.Tensor, gamma: torch.Tensor, blur_sigma: torch.Tensor, window: HUWindow
) -> torch.Tensor:
    """Clip, apply gamma and a 3 x 3 Gaussian blur on 0..1 intensities, and z-score; no loop over views.

    The drawn numbers come with the sample (see ``RandSlabMultiCrop``), so that this is a pure function, on
    any device. Gamma 1 and sigma 0 leave a view as ``normalize_hu`` makes it.

    Source: DALE-CT III-A; order and 3 x 3 kernel from the released configurations.

    Args:
        views: ``(B, V, S, S)`` HU, any real type.
        gamma: ``(B, V)``, exponent of each view's 0..1 intensity.
        blur_sigma: ``(B, V)``, standard deviation of its blur in view pixels; 0 for none. Borders reflect.
        window: clip range and statistics in HU.

    Returns:
        float32 ``(B, V, 1, S, S)``.

    Raises:
        ValueError: if the shapes do not agree.
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


def resize_square(crop: np.ndarray, size_px: int) -> np.ndarray:
    """Resize a square image, area-true: bilinear when enlarging, a wider triangle filter when reducing.

    The same as ``torch.nn.functional.interpolate(mode="bilinear", antialias=True)`` but for rounding, at a
    third of its CPU time on one thread: the filter's matrix has few entries per row and is made once per pair
    of sizes.

    Args:
        crop: ``(side, side)``, any real type.
        size_px: S.

    Returns:
        float32 ``(S, S)``.

    Raises:
        ValueError: if the crop is not square.
    """
    if crop.ndim != 2 or crop.shape[0] != crop.shape[1]:
        raise ValueError(f"crop must be a square image, got shape {crop.shape}.")
    filters = _sparse_filters(crop.shape[0], size_px)
    rows_resized = filters @ crop.astype(np.float32)
    resized: np.ndarray = (filters @ np.ascontiguousarray(rows_resized.T)).T
    return resized


@lru_cache(maxsize=1024)
def _sparse_filters(side_px: int, size_px: int) -> csr_matrix:
    """``triangle_filters`` of one side; the latest 1024 are kept, some 10 kB each."""
    return csr_matrix(triangle_filters(torch.tensor([side_px]), side_px, size_px)[0].numpy())


def resize_squares(
    pixels: torch.Tensor, sides_px: torch.Tensor, largest_px: int, size_px: int
) -> torch.Tensor:
    """Do as ``resize_square`` for many crops at once, on any device, without waiting for it.

    Two batched dense products, of which a triangle filter uses few entries: far more arithmetic than the
    sparse ones, and still a millisecond for a batch on a GPU, where it saves hundreds of launches.

    Args:
        pixels: ``(sum of sides_px squared,)``, the crops, rows first, one after the other.
        sides_px: ``(N,)``, side of each crop.
        largest_px: at least the largest of them, K; stated because the device is not asked.
        size_px: S.

    Returns:
        float32 ``(N, S, S)``.
    """
    sides = sides_px.long()[:, None]
    firsts = (sides.square().cumsum(0) - sides.square())[..., None]
    inside = torch.arange(largest_px, device=pixels.device)
    # Beyond a crop are pixels of another, which the filters weigh with 0.
    places = firsts + inside[:, None] * sides[..., None] + inside
    crops = pixels[places.clamp_(max=len(pixels) - 1)].float()
    filters = triangle_filters(sides_px, largest_px, size_px)
    return filters @ crops @ filters.mT


def triangle_filters(sides_px: torch.Tensor, largest_px: int, size_px: int) -> torch.Tensor:
    """Weights ``(N, S, K)`` that resize samples to ``size_px``: one triangle per row, summing to 1.

    The triangle of output sample i is centred on (i + 1/2) side / size in units where input sample j covers
    [j, j + 1), and reaches max(side / size, 1) to both sides. Weights are ratios of whole numbers that
    float32 holds, so that they are the same on every device; they are 0 beyond a filter's input.

    Args:
        sides_px: ``(N,)``, number of input samples of each filter.
        largest_px: at least the largest of them, K.
        size_px: number of output samples, S.

    Example:
        >>> triangle_filters(torch.tensor([2]), 3, 4)[0]
        tensor([[1.0000, 0.0000, 0.0000],
                [0.7500, 0.2500, 0.0000],
                [0.2500, 0.7500, 0.0000],
                [0.0000, 1.0000, 0.0000]])
    """
    sides = sides_px.int()[:, None, None]
    inputs = torch.arange(largest_px, dtype=torch.int32, device=sides_px.device)
    outputs = torch.arange(size_px, dtype=torch.int32, device=sides_px.device)[:, None]
    # 1 - |j + 1/2 - (i + 1/2) side / size| / reach, times 2 max(side, size)
    distances = ((2 * inputs + 1) * size_px - (2 * outputs + 1) * sides).abs_()
    weights = (2 * sides.clamp(min=size_px) - distances).clamp_(min=0) * (inputs < sides)
    return weights.float() / weights.sum(-1, keepdim=True)
