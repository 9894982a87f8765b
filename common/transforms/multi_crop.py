"""Draws label-guided, depth-aware views: global ones of the centre slice, local ones across the slab."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

# S slices, M side of the mask grid, N V views (Vg global first, then Vl local), P view size, H W pixels

UNGUIDED, GUIDED_BY_TS, GUIDED_BY_REX = 0, 1, 2
"""Values of ``guide``: what a view was centred on."""

GUIDANCE_MODES = ("paper", "released")


class PositiveCells:
    """Positive cells of a slab's mask ``(S, M, M)``, in the order of slice, row and column.

    They are counted by row, and looked for only in the rows that are asked for. ``by_slice (S,)`` is their
    number in each slice.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self._positive = mask != 0
        # eight cells a byte: a tenth of the time of counting cells
        by_row = np.bitwise_count(np.packbits(self._positive, axis=-1)).sum(-1, dtype=np.intp)
        self._up_to_row = by_row.ravel().cumsum()
        self.by_slice = by_row.sum(1)

    def take(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the cells of ranks from 0: their slices ``(N,)``, and (row, column) in the grid ``(N, 2)``."""
        rows = np.searchsorted(self._up_to_row, ranks, side="right")
        cells = self._positive.reshape(len(self._up_to_row), -1)[rows]
        before = self._up_to_row[rows] - cells.sum(1)
        columns = (cells.cumsum(1) == (ranks - before + 1)[:, None]).argmax(1)
        slices, rows = np.divmod(rows, self._positive.shape[1])
        return slices, np.column_stack([rows, columns])


def nearest_cells(
    starts_px: torch.Tensor, sides_px: torch.Tensor, size_px: int, lengths_px: torch.Tensor, grid: int
) -> torch.Tensor:
    """Find the mask cell under each pixel of views along one axis.

    The mask is enlarged to the slice, cropped and resized to the view, each nearest, as indices alone: the
    input under the centre of each output pixel, which is where the image's resize is centred too.

    Args:
        starts_px: first slice pixel of each crop.
        sides_px: slice pixels of each crop.
        size_px: pixels of a view, P.
        lengths_px: pixels of each slice.
        grid: cells of the mask.

    Shape:
        ``(N,)`` each. Output: int64 ``(N, P)``.
    """
    centres = 2 * torch.arange(size_px, device=starts_px.device) + 1
    pixels = starts_px.long()[:, None] + centres * sides_px.long()[:, None] // (2 * size_px)
    return (2 * pixels + 1) * grid // (2 * lengths_px.long()[:, None])


class ViewPlan(NamedTuple):
    """Everything random about the views of one sample, global views first.

    Shape:
        ``boxes`` int32 (V, 4): slice in the slab, top, left and side of the crop in slice pixels.
        ``guide`` int8 (V,): ``UNGUIDED``, ``GUIDED_BY_TS`` or ``GUIDED_BY_REX``.
        ``points`` float32 (V, 2): guidance point (row, column) in slice pixels, pixel i covering [i, i + 1);
        NaN where unguided.
        ``flips`` bool (V,): whether the view is mirrored, columns reversed.
        ``gamma``, ``blur_sigma`` float32 (V,): arguments of ``photometric``.
    """

    boxes: np.ndarray
    guide: np.ndarray
    points: np.ndarray
    flips: np.ndarray
    gamma: np.ndarray
    blur_sigma: np.ndarray


class RandSlabMultiCrop:
    """Draw the views of a slab.

    Drawing needs only the slab's masks and is a function of the generator; ``cut_crops`` reads the slices
    that the plan uses, and ``render_views`` makes the views of a whole batch. Crops are squares inside the
    slice; global views come from slice ``slab_len // 2``.

    With ``guided_prob`` a view is centred on a random position of a ReX finding, if the slab (for a global
    view: its centre slice) has one, else on a random TotalSegmentator foreground position, and a local view
    takes the slice of its position; otherwise slice and place are uniform. A position is uniform over the
    positive cells of the mask grid and within its cell. ``guidance="released"`` is what the released code did
    instead: global views are never guided; a local view draws its slice first, is centred on a finding there
    with ``guided_prob``, and else always on TotalSegmentator foreground where the slice has any.

    Source: DALE-CT III-A and III-C1. Numbers the paper does not state are those of the released
    configurations: scales, gamma, blur.

    Args:
        global_size_px: side of a global view. Paper: 256 (0, 2S), 224 (1S).
        local_size_px: side of a local view. Paper: 144 (0, 2S), 140 (1S).
        patch_size_px: side of the encoder's patches; must divide both sizes.
        num_global: global views. Paper: 2.
        num_local: local views. Paper: 8.
        global_scale: range of a global crop's side, in units of the slice's smaller side. Released: 0.6-1.0.
        local_scale: the same for local crops. Released: 0.3-0.6.
        guided_prob: chance of guidance, of all views or of each, global ones first. Paper: 0.8 (LeJEPA); 6 of
            the 14 local views (DINOv2 baseline).
        guidance: "paper" or "released", see above.
        gamma_prob: chance that a view's gamma is drawn; else it is 1. Released: 0.8.
        gamma_range: gamma is uniform in it. Released: 0.9-1.1.
        blur_probs: chance of blur for each global view; local views have none. Released: 0.5 and 0.1.
        blur_sigma_range: blur's standard deviation in view pixels, uniform in it. Released: 0.1-2.0.
        flip_prob: chance to mirror left and right. Our choice 0: laterality is anatomy; released: 0.5.

    Raises:
        ValueError: if an argument is out of range or the sizes are no multiples of the patch size.
    """

    def __init__(
        self,
        *,
        global_size_px: int,
        local_size_px: int,
        patch_size_px: int,
        num_global: int,
        num_local: int,
        global_scale: Sequence[float],
        local_scale: Sequence[float],
        guided_prob: float | Sequence[float],
        guidance: str,
        gamma_prob: float,
        gamma_range: Sequence[float],
        blur_probs: Sequence[float],
        blur_sigma_range: Sequence[float],
        flip_prob: float,
    ) -> None:
        _check_size("global_size_px", global_size_px, patch_size_px)
        _check_size("local_size_px", local_size_px, patch_size_px)
        _check_views(num_global, num_local, blur_probs)
        if guidance not in GUIDANCE_MODES:
            raise ValueError(f"guidance must be one of {GUIDANCE_MODES}, got '{guidance}'.")
        guided_probs = _for_each_view(guided_prob, num_global + num_local)
        chances = {"guided_prob": guided_probs, "blur_probs": blur_probs}
        chances |= {"gamma_prob": [gamma_prob], "flip_prob": [flip_prob]}
        for name, prob in [(name, prob) for name, probs in chances.items() for prob in probs]:
            if not 0 <= prob <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {prob}.")
        self.sizes_px = (global_size_px, local_size_px)
        self.patch_size_px = patch_size_px
        self.num_views = (num_global, num_local)
        self.global_scale = _checked_range("global_scale", global_scale, upper=1.0)
        self.local_scale = _checked_range("local_scale", local_scale, upper=1.0)
        self.guided_probs = np.array(guided_probs)
        self.guidance = guidance
        self.gamma_prob = gamma_prob
        self.gamma_range = _checked_range("gamma_range", gamma_range)
        self.blur_probs = np.array([*blur_probs, *[0.0] * num_local])
        self.blur_sigma_range = _checked_range("blur_sigma_range", blur_sigma_range)
        self.flip_prob = flip_prob

    def draw(
        self,
        rng: np.random.Generator,
        slab_len: int,
        shape: tuple[int, int],
        ts: np.ndarray | None,
        rex: np.ndarray | None,
    ) -> ViewPlan:
        """Draw slices, boxes and photometric numbers of one sample.

        Args:
            rng: the only source of randomness.
            slab_len: slices in the slab.
            shape: (H, W) of a slice in pixels.
            ts: TotalSegmentator ids (slab_len, M, M), 0 background; None if the volume has none.
            rex: ReX finding bits (slab_len, M, M); None if the volume has none.

        Raises:
            ValueError: if the slab is empty or a mask has another number of slices.
        """
        if slab_len < 1:
            raise ValueError(f"slab_len must be positive, got {slab_len}.")
        for name, masks in (("ts", ts), ("rex", rex)):
            if masks is not None and (masks.ndim != 3 or len(masks) != slab_len):
                raise ValueError(
                    f"{name} must have shape (slab_len, M, M), got {masks.shape} for {slab_len} slices."
                )
        num_global, num_local = self.num_views
        num_views = num_global + num_local
        scales = np.array([self.global_scale] * num_global + [self.local_scale] * num_local)
        sides = np.floor(rng.uniform(scales[:, 0], scales[:, 1]) * min(shape) + 0.5).clip(1)
        slices = np.full(num_views, slab_len // 2)
        slices[num_global:] = rng.integers(slab_len, size=num_local)
        is_guided = rng.random(num_views) < self.guided_probs
        ranks, within = rng.random(num_views), rng.random((num_views, 2))
        guide, points = np.full(num_views, UNGUIDED, np.int8), np.full((num_views, 2), np.nan)
        for kind, mask in ((GUIDED_BY_REX, rex), (GUIDED_BY_TS, ts)):  # findings come first
            if mask is None:
                continue
            cells = PositiveCells(mask)
            firsts, counts = self._choices(kind, cells.by_slice, slices, is_guided)
            chosen = (counts > 0) & (guide == UNGUIDED)
            found = firsts[chosen] + (ranks[chosen] * counts[chosen]).astype(np.intp)
            slices[chosen], places = cells.take(found)
            guide[chosen], points[chosen] = kind, (places + within[chosen]) / mask.shape[1:] * shape
        room = np.array(shape) - sides[:, None]
        centred = np.floor(points - sides[:, None] / 2 + 0.5).clip(0, room)
        corners = np.where(np.isnan(points), np.floor(within * (room + 1)), centred)
        boxes = np.column_stack([slices, corners, sides]).astype(np.int32)
        flips = rng.random(num_views) < self.flip_prob
        has_gamma = rng.random(num_views) < self.gamma_prob
        gamma = np.where(has_gamma, rng.uniform(*self.gamma_range, num_views), 1).astype(np.float32)
        has_blur = rng.random(num_views) < self.blur_probs
        sigma = np.where(has_blur, rng.uniform(*self.blur_sigma_range, num_views), 0).astype(np.float32)
        return ViewPlan(boxes, guide, points.astype(np.float32), flips, gamma, sigma)

    def _choices(
        self, kind: int, by_slice: np.ndarray, slices: np.ndarray, is_guided: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """First rank and number of the positive cells that each view may be centred on."""
        is_global = np.arange(len(slices)) < self.num_views[0]
        wanted, bound_to_slice = is_guided, is_global
        if self.guidance == "released":
            wanted = ~is_global & (is_guided | (kind == GUIDED_BY_TS))
            bound_to_slice = ~is_global
        up_to = np.concatenate([[0], by_slice.cumsum()])
        firsts = np.where(bound_to_slice, up_to[slices], 0)
        ends = np.where(bound_to_slice, up_to[slices + 1], up_to[-1])
        return firsts, np.where(wanted, ends - firsts, 0)


def cut_crops(boxes: np.ndarray, read_slice: Callable[[int], np.ndarray]) -> np.ndarray:
    """Cut the crops of views out of their slices.

    Args:
        boxes: boxes of ``ViewPlan``, (V, 4).
        read_slice: returns a slice of the slab, int16 HU (H, W); called once per slice used.

    Returns:
        int16 HU (sum of the squares of the sides,): crop after crop, each by rows.
    """
    ends = (boxes[:, 3].astype(np.int64) ** 2).cumsum()
    pixels = np.empty(ends[-1], np.int16)
    slices: dict[int, np.ndarray] = {}
    for (z, top, left, side), end in zip(boxes.tolist(), ends.tolist(), strict=True):
        if z not in slices:
            slices[z] = read_slice(z)
        crop = slices[z][top : top + side, left : left + side]
        pixels[end - side * side : end].reshape(side, side)[:] = crop
    return pixels


def _check_size(name: str, size_px: int, patch_size_px: int) -> None:
    if patch_size_px < 1 or size_px < 1 or size_px % patch_size_px:
        nearest = max(round(size_px / max(patch_size_px, 1)), 1) * patch_size_px
        raise ValueError(
            f"{name} must be a multiple of patch_size_px, got {size_px} and {patch_size_px}. "
            f"Use {nearest}, or another patch_size_px."
        )


def _check_views(num_global: int, num_local: int, blur_probs: Sequence[float]) -> None:
    if num_global < 1 or num_local < 1:
        raise ValueError(f"num_global and num_local must be positive, got {num_global} and {num_local}.")
    if len(blur_probs) != num_global:
        raise ValueError(
            f"blur_probs must have one entry per global view, got {len(blur_probs)} for {num_global}."
        )


def _for_each_view(guided_prob: float | Sequence[float], num_views: int) -> Sequence[float]:
    if not isinstance(guided_prob, Sequence):
        return [guided_prob] * num_views
    if len(guided_prob) != num_views:
        raise ValueError(
            f"guided_prob must be one number or one per view, got {len(guided_prob)} for {num_views} views."
        )
    return guided_prob


def _checked_range(name: str, bounds: Sequence[float], upper: float = math.inf) -> tuple[float, float]:
    """Return the bounds if 0 < low <= high <= upper."""
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= upper:
        limit = "" if upper == math.inf else f" of at most {upper}"
        raise ValueError(f"{name} must be two increasing positive numbers{limit}, got {list(bounds)}.")
    return float(bounds[0]), float(bounds[1])
