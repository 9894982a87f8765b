"""Label-guided, depth-aware multi-crop: global views of the centre slice, local views across the slab."""

# V views (Vg global first, then Vl local), S view size, M side of the mask grid, H W slice pixels

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from common.transforms.mask_grid import MaskPositions, nearest_cells
from common.transforms.resize import resize_square

UNGUIDED, GUIDED_BY_TS, GUIDED_BY_REX = 0, 1, 2
"""Values of ``guide``: what a view was centred on."""

GUIDANCE_MODES = ("paper", "released")


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
    """Draw and render the views of a slab.

    Drawing (``draw``) needs only the slab's masks and is a function of the generator; rendering (``render``)
    reads only the slices that the plan uses. Crops are squares inside the slice; global views come from slice
    ``slab_len // 2``.

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
        guided_prob: chance of guidance. Paper: 0.8.
        guidance: "paper" or "released", see above.
        gamma_prob: chance that a view's gamma is drawn; else it is 1. Released: 0.8.
        gamma_range: gamma is uniform in it. Released: 0.9-1.1.
        blur_probs: chance of blur for each global view; local views have none. Released: 0.5 and 0.1.
        blur_sigma_range: blur's standard deviation in view pixels, uniform in it. Released: 0.1-2.0.
        flip_prob: chance to mirror left and right. Our choice 0: laterality is anatomy; released: 0.5.

    Raises:
        ValueError: if an argument is out of range or the sizes are no multiples of the patch size.

    Example:
        >>> multi_crop = RandSlabMultiCrop(32, 16, patch_size_px=16)
        >>> plan = multi_crop.draw(np.random.default_rng(0), slab_len=5, shape=(64, 64), ts=None, rex=None)
        >>> plan.boxes[:2, 0]
        array([2, 2], dtype=int32)
        >>> views = multi_crop.render(plan, lambda z: np.full((64, 64), z, np.int16), ts=None, rex=None)
        >>> views["local_views"].shape
        (8, 16, 16)
    """

    def __init__(
        self,
        global_size_px: int,
        local_size_px: int,
        patch_size_px: int,
        num_global: int = 2,
        num_local: int = 8,
        global_scale: Sequence[float] = (0.6, 1.0),
        local_scale: Sequence[float] = (0.3, 0.6),
        guided_prob: float = 0.8,
        guidance: str = "paper",
        gamma_prob: float = 0.8,
        gamma_range: Sequence[float] = (0.9, 1.1),
        blur_probs: Sequence[float] = (0.5, 0.1),
        blur_sigma_range: Sequence[float] = (0.1, 2.0),
        flip_prob: float = 0.0,
    ) -> None:
        _check_size("global_size_px", global_size_px, patch_size_px)
        _check_size("local_size_px", local_size_px, patch_size_px)
        _check_views(num_global, num_local, blur_probs)
        if guidance not in GUIDANCE_MODES:
            raise ValueError(f"guidance must be one of {GUIDANCE_MODES}, got '{guidance}'.")
        chances = {"guided_prob": guided_prob, "gamma_prob": gamma_prob, "flip_prob": flip_prob}
        for name, prob in [*chances.items(), *(("blur_probs", prob) for prob in blur_probs)]:
            if not 0 <= prob <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {prob}.")
        self.sizes_px = (global_size_px, local_size_px)
        self.num_views = (num_global, num_local)
        self.global_scale = _checked_range("global_scale", global_scale, upper=1.0)
        self.local_scale = _checked_range("local_scale", local_scale, upper=1.0)
        self.guided_prob = guided_prob
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
        lucky = rng.random(num_views) < self.guided_prob
        ranks, within = rng.random(num_views), rng.random((num_views, 2))
        guide, points = np.zeros(num_views, np.int8), np.full((num_views, 2), np.nan)
        positions = MaskPositions({GUIDED_BY_TS: ts, GUIDED_BY_REX: rex})
        for view in range(num_views):
            for kind, z in self._guides(view < num_global, int(slices[view]), bool(lucky[view])):
                if positions.count(kind, z) > 0:
                    slices[view], place = positions.pick(kind, z, ranks[view], within[view])
                    guide[view], points[view] = kind, place * shape
                    break
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

    def render(
        self,
        plan: ViewPlan,
        read_slice: Callable[[int], np.ndarray],
        ts: np.ndarray | None,
        rex: np.ndarray | None,
        with_masks: bool = True,
    ) -> dict[str, np.ndarray]:
        """Cut and resize the views, and their masks, from the slices that the plan uses.

        Args:
            plan: of ``draw``.
            read_slice: returns a slice of the slab, int16 HU (H, W); called once a slice used.
            ts: as in ``draw``.
            rex: as in ``draw``.
            with_masks: whether to render masks; a source that is None gives zeros.

        Returns:
            ``global_views`` (Vg, S, S), ``local_views`` (Vl, s, s): int16 HU, antialiased and rounded. With
            masks ``global_ts``, ``local_ts`` uint8 ids and ``global_rex``, ``local_rex`` int16 bits, of the
            same shapes: the nearest resize of the crop of the mask enlarged (nearest) to the slice.
        """
        slices = {z: read_slice(z) for z in sorted(set(plan.boxes[:, 0].tolist()))}
        shape = next(iter(slices.values())).shape
        sources = (("ts", ts, np.uint8), ("rex", rex, np.int16)) if with_masks else ()
        boxes, flips = plan.boxes.tolist(), plan.flips.tolist()
        out: dict[str, np.ndarray] = {}
        first = 0
        for group, size_px, num_views in zip(("global", "local"), self.sizes_px, self.num_views, strict=True):
            views = out[f"{group}_views"] = np.empty((num_views, size_px, size_px), np.int16)
            for source, _, dtype in sources:
                out[f"{group}_{source}"] = np.zeros(views.shape, dtype)
            for view, (z, top, left, side) in enumerate(boxes[first : first + num_views]):
                step = -1 if flips[first + view] else 1
                resized = resize_square(slices[z][top : top + side, left : left + side], size_px)
                views[view] = np.rint(resized)[:, ::step]
                for source, masks, _ in sources:
                    if masks is not None:
                        rows = nearest_cells(top, side, size_px, shape[0], masks.shape[1])
                        columns = nearest_cells(left, side, size_px, shape[1], masks.shape[2])[::step]
                        out[f"{group}_{source}"][view] = masks[z].take(columns, axis=1).take(rows, axis=0)
            first += num_views
        return out

    def _guides(self, is_global: bool, z: int, lucky: bool) -> Sequence[tuple[int, int | None]]:
        """Kinds of position to centre a view on, best first, each with the slice to look in; None: any."""
        if self.guidance == "released":
            if is_global:
                return []
            return [(GUIDED_BY_REX, z)] * lucky + [(GUIDED_BY_TS, z)]
        where = z if is_global else None
        return [(GUIDED_BY_REX, where), (GUIDED_BY_TS, where)] * lucky


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
            f"blur_probs must have one entry a global view, got {len(blur_probs)} for {num_global}."
        )


def _checked_range(name: str, bounds: Sequence[float], upper: float = math.inf) -> tuple[float, float]:
    """Return the bounds if 0 < low <= high <= upper."""
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= upper:
        limit = "" if upper == math.inf else f" of at most {upper}"
        raise ValueError(f"{name} must be two increasing positive numbers{limit}, got {list(bounds)}.")
    return float(bounds[0]), float(bounds[1])
