"""What training hands from the loader to the step: the views of one slab, and those of a batch of slabs."""

# B slabs, V views (Vg global first, then Vl local), P patches of a view, M side of the mask grid, C labels

from collections.abc import Iterable, Sequence
from typing import Any, Generic, NotRequired, TypedDict, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import get_worker_info

from common.transforms.soft_labels import most_cells_per_patch

Array = TypeVar("Array")

VIEW_FIELDS = ("global_pixels", "local_pixels", "boxes", "flips", "gamma", "blur_sigma")
"""What ``render_views`` reads on the device."""

LABEL_FIELDS = ("shape", "ts_planes", "rex_planes", "ts_plane", "rex_plane", "has_ts", "has_rex")
"""What soft labels are counted from on the device, and which of them count."""

MASK_FIELDS = ("masks", "masked_places", "masked_weights")
"""What DINOv2's networks and iBOT's loss read on the device, beside the views."""


class Views(TypedDict, Generic[Array]):
    """What a sample and a batch have in common.

    Shape:
        ``global_pixels``, ``local_pixels`` int16 HU: the crops one after the other (``cut_crops``).
        ``boxes``, ``guide``, ``points``, ``flips``, ``gamma``, ``blur_sigma``: see ``ViewPlan``.
        ``shape`` int32 (2,): height and width of the slices.
        ``labels`` int8 (C,): 1, 0, or -1 where not labelled. ``spacing_mm`` float32 (3,): x, y, z.
        With masks ``ts_planes`` uint8 ids and ``rex_planes`` int16 bits (planes, M, M): those under a view
        that are not empty; ``ts_plane``, ``rex_plane`` int64 (V,): the plane under each view, -1 if empty.
        With ``PatchMasks`` ``masks`` bool (Vg, P): patches the student does not see.
    """

    global_pixels: Array
    local_pixels: Array
    boxes: Array
    guide: Array
    points: Array
    flips: Array
    gamma: Array
    blur_sigma: Array
    shape: Array
    labels: Array
    spacing_mm: Array
    ts_planes: NotRequired[Array]
    ts_plane: NotRequired[Array]
    rex_planes: NotRequired[Array]
    rex_plane: NotRequired[Array]
    masks: NotRequired[Array]


class Sample(Views[np.ndarray]):
    """The views of one slab before they are rendered.

    ``has_ts``, ``has_rex``: whether the volume has these masks; ``first_slice`` of the slab in its volume;
    ``position`` of the slab in the run.
    """

    volume: str
    has_ts: bool
    has_rex: bool
    first_slice: int
    position: int


class Batch(Views[torch.Tensor]):
    """The views of B slabs, along a new first axis; slices of different sizes go into one batch.

    The pixels of all samples lie one after the other, and so do the planes, after an empty one: a view
    without mask has plane 0. ``masked_places`` and ``masked_weights`` are those of ``PatchMasks``. Whole
    numbers, so that a device need not be asked: ``num_global``, ``patch_size_px``; for global and local views
    ``sizes_px``, ``largest_px`` (the largest crop's side) and, with masks, ``most_cells`` (mask cells that a
    patch may touch along a side).
    """

    volume: list[str]
    has_ts: torch.Tensor
    has_rex: torch.Tensor
    first_slice: torch.Tensor
    position: torch.Tensor
    num_global: int
    patch_size_px: int
    sizes_px: list[int]
    largest_px: list[int]
    most_cells: NotRequired[list[int]]
    masked_places: NotRequired[torch.Tensor]
    masked_weights: NotRequired[torch.Tensor]


def collate_views(
    samples: Sequence[Sample], num_global: int, sizes_px: Sequence[int], patch_size_px: int
) -> Batch:
    """Put samples together, all with masks or all without; sides are those of a global and a local view."""
    batch: dict[str, Any] = {"num_global": num_global, "sizes_px": list(sizes_px)}
    batch["patch_size_px"] = patch_size_px
    for name in samples[0]:
        values = [cast(Any, sample)[name] for sample in samples]
        if name in ("global_pixels", "local_pixels"):
            batch[name] = _joined(values)
        elif isinstance(values[0], str):
            batch[name] = values
        elif not name.startswith(("ts_plane", "rex_plane")):
            batch[name] = torch.from_numpy(np.stack(values))
    sides = batch["boxes"][..., 3]
    largest = [sides[:, :num_global].amax(1).tolist(), sides[:, num_global:].amax(1).tolist()]
    batch["largest_px"] = [max(sides) for sides in largest]
    if "ts_planes" in samples[0]:
        for mask in ("ts", "rex"):
            planes, numbers = (
                [cast(Any, sample)[f"{mask}_plane{s}"] for sample in samples] for s in ("s", "")
            )
            batch[f"{mask}_planes"], batch[f"{mask}_plane"] = _joined_planes(planes, numbers)
        lengths, grid = batch["shape"].amin(1).tolist(), batch["ts_planes"].shape[-1]
        batch["most_cells"] = [
            max(
                most_cells_per_patch(side, size, length, patch_size_px, grid)
                for side, length in zip(sides, lengths, strict=True)
            )
            for sides, size in zip(largest, sizes_px, strict=True)
        ]
    return cast(Batch, batch)


def on_device(batch: Batch, names: Iterable[str], device: torch.device) -> Batch:
    """Return a batch whose named tensors, if it has them, are on a device; nothing waits for the copies."""
    found = {name: part for name, part in batch.items() if name in names and isinstance(part, torch.Tensor)}
    moved = {name: part.to(device, non_blocking=True) for name, part in found.items()}
    return cast(Batch, {**batch, **moved})


def _joined_planes(
    planes: Sequence[np.ndarray], numbers: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the planes of all samples through, after an empty one for views without."""
    firsts = np.cumsum([1, *map(len, planes)])[:-1, None]
    number = np.stack(numbers)
    empty = np.zeros_like(planes[0], shape=(1, *planes[0].shape[1:]))
    return _joined([empty, *planes]), torch.from_numpy(np.where(number < 0, 0, number + firsts))


def _joined(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Put arrays one after the other; in a worker right into the memory that the trainer reads from."""
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    like = torch.from_numpy(arrays[0][:0])
    if get_worker_info() is None:
        joined = like.new_empty(shape)
    else:  # as default_collate does
        joined = like.new(like._typed_storage()._new_shared(int(np.prod(shape)))).view(shape)
    np.concatenate(arrays, out=joined.numpy())
    return joined
