"""What training hands from the loader to the step: the views of one slab, and those of a batch of slabs."""

# B slabs, V views (Vg global first, then Vl local), P patches of a view, M side of the mask grid, C labels

from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch.utils.data import get_worker_info

from common.transforms.soft_labels import most_cells_per_patch

VIEW_FIELDS = ("global_pixels", "local_pixels", "boxes", "flips", "gamma", "blur_sigma")
"""What ``render_views`` reads on the device."""

LABEL_FIELDS = ("shape", "ts_planes", "rex_planes", "ts_plane", "rex_plane", "has_ts", "has_rex")
"""What soft labels are counted from on the device, and which of them count."""

MASK_FIELDS = ("masks", "masked_places", "masked_weights")
"""What DINOv2's networks and iBOT's loss read on the device, beside the views."""


class Sample(TypedDict):
    """The views of one slab before they are rendered; arrays of NumPy.

    Shape:
        ``global_pixels``, ``local_pixels`` int16 HU: the crops one after the other (``cut_crops``).
        ``boxes``, ``guide``, ``points``, ``flips``, ``gamma``, ``blur_sigma``: see ``ViewPlan``.
        ``shape`` int32 (2,): height and width of the slices.
        ``has_ts``, ``has_rex``: whether the volume has these masks.
        ``labels`` int8 (C,): 1, 0, or -1 where not labelled.
        ``position``: place of the slab in the run. ``first_slice``: of the slab. ``spacing_mm`` float32 (3,).
        With masks ``ts_planes`` uint8 ids and ``rex_planes`` int16 bits (planes, M, M): those under a view
        that are not empty; ``ts_plane``, ``rex_plane`` int64 (V,): the plane under each view, -1 if empty.
        With ``PatchMasks`` ``masks`` bool (Vg, P): patches the student does not see.
    """

    global_pixels: np.ndarray
    local_pixels: np.ndarray
    boxes: np.ndarray
    guide: np.ndarray
    points: np.ndarray
    flips: np.ndarray
    gamma: np.ndarray
    blur_sigma: np.ndarray
    shape: np.ndarray
    has_ts: bool
    has_rex: bool
    labels: np.ndarray
    volume: str
    first_slice: int
    spacing_mm: np.ndarray
    position: int
    ts_planes: NotRequired[np.ndarray]
    ts_plane: NotRequired[np.ndarray]
    rex_planes: NotRequired[np.ndarray]
    rex_plane: NotRequired[np.ndarray]
    masks: NotRequired[np.ndarray]


class Batch(TypedDict):
    """The views of B slabs; slices of different sizes go into one batch.

    Shape:
        As ``Sample``, along a new first axis B; but the pixels of all samples one after the other, and so the
        planes, after an empty one: a view without mask has plane 0. ``masked_places``, ``masked_weights``:
        see ``masked_places``. Whole numbers, so that a device need not be asked: ``num_global``; for global
        and local views ``sizes_px``, ``largest_px`` (the largest crop's side) and, with masks, ``most_cells``
        (mask cells that a patch may touch along a side).
    """

    global_pixels: torch.Tensor
    local_pixels: torch.Tensor
    boxes: torch.Tensor
    guide: torch.Tensor
    points: torch.Tensor
    flips: torch.Tensor
    gamma: torch.Tensor
    blur_sigma: torch.Tensor
    shape: torch.Tensor
    has_ts: torch.Tensor
    has_rex: torch.Tensor
    labels: torch.Tensor
    volume: list[str]
    first_slice: torch.Tensor
    spacing_mm: torch.Tensor
    position: torch.Tensor
    num_global: int
    sizes_px: list[int]
    largest_px: list[int]
    patch_size_px: int
    most_cells: NotRequired[list[int]]
    ts_planes: NotRequired[torch.Tensor]
    ts_plane: NotRequired[torch.Tensor]
    rex_planes: NotRequired[torch.Tensor]
    rex_plane: NotRequired[torch.Tensor]
    masks: NotRequired[torch.Tensor]
    masked_places: NotRequired[torch.Tensor]
    masked_weights: NotRequired[torch.Tensor]


def collate_views(
    samples: Sequence[Sample], num_global: int, sizes_px: Sequence[int], patch_size_px: int
) -> Batch:
    """Put samples together.

    Args:
        samples: B of them, all with masks or all without.
        num_global: global views per sample.
        sizes_px: sides of a global and of a local view.
        patch_size_px: side of the encoder's patches.
    """
    batch: dict[str, Any] = {"num_global": num_global, "sizes_px": list(sizes_px)}
    batch["patch_size_px"] = patch_size_px
    for name in samples[0]:
        values = [cast(dict[str, Any], sample)[name] for sample in samples]
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
        batch["ts_planes"], batch["ts_plane"] = _joined_planes(
            [sample["ts_planes"] for sample in samples], [sample["ts_plane"] for sample in samples]
        )
        batch["rex_planes"], batch["rex_plane"] = _joined_planes(
            [sample["rex_planes"] for sample in samples], [sample["rex_plane"] for sample in samples]
        )
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
    fields: dict[str, Any] = dict(batch)
    return cast(
        Batch,
        fields | {name: fields[name].to(device, non_blocking=True) for name in names if name in fields},
    )


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
