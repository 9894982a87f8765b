"""The views of a whole batch, from the crops that the loader cut to what the encoder sees."""

# B slabs, V views of a group (Vg global, Vl local), S their size (S global, s local)

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from common.transforms.hounsfield import HUWindow
from common.transforms.photometric import photometric
from common.transforms.resize import resize_square, resize_squares
from common.transforms.soft_labels import PatchCells, coverage_fractions, patch_cells

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
