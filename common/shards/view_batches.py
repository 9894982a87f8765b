"""Samples of views put together to a batch that is cheap to hand from process to process and to a device."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from common.transforms.soft_labels import most_cells_per_patch

# B slabs, V views, M side of the mask grid


JOINED = ("global_pixels", "local_pixels")
MASKS = ("ts", "rex")


def collate_views(
    samples: Sequence[Mapping[str, Any]], num_global: int, sizes_px: Sequence[int], patch_size_px: int
) -> dict[str, Any]:
    """Put samples of ``SlabViews`` together; slices of different sizes go into one batch.

    Args:
        samples: B of them, all with masks or all without.
        num_global: global views of a sample.
        sizes_px: sides of a global and of a local view.
        patch_size_px: side of the encoder's patches.

    Returns:
        Of each entry of a sample a tensor along a new first axis, or a list of its names; but
        ``global_pixels`` and ``local_pixels`` one after the other, and with masks ``ts_planes``,
        ``rex_planes`` (planes, M, M) of the whole batch, the first of which is empty, with ``ts_plane``,
        ``rex_plane`` int64 (B, V): the plane under each view. In addition whole numbers, which a device need
        not be asked for: ``num_global``; ``sizes_px``; ``largest_px``, the largest crop's side; with masks
        ``most_cells``, how many mask cells a patch may touch along a side; the last three for global and
        local views.
    """
    batch: dict[str, Any] = {"num_global": num_global, "sizes_px": list(sizes_px)}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name in JOINED:
            batch[name] = _joined(values)
        elif isinstance(values[0], str):
            batch[name] = values
        elif not name.startswith(tuple(f"{mask}_plane" for mask in MASKS)):
            batch[name] = torch.from_numpy(np.stack(values))
    sides = batch["boxes"][..., 3]
    largest = [sides[:, :num_global].amax(1).tolist(), sides[:, num_global:].amax(1).tolist()]
    batch["largest_px"] = [max(sides) for sides in largest]
    for mask in MASKS:
        if f"{mask}_planes" in samples[0]:
            batch |= _joined_planes(mask, samples)
    if "ts_planes" in batch:
        lengths, grid = batch["shape"].amin(1).tolist(), batch["ts_planes"].shape[-1]
        batch["most_cells"] = [
            max(
                most_cells_per_patch(side, size, length, patch_size_px, grid)
                for side, length in zip(sides, lengths, strict=True)
            )
            for sides, size in zip(largest, sizes_px, strict=True)
        ]
    return batch


def _joined_planes(mask: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Number the planes of all samples through, after an empty one for views without."""
    planes = [sample[f"{mask}_planes"] for sample in samples]
    firsts = np.cumsum([1, *map(len, planes)])[:-1]
    numbers = np.stack([sample[f"{mask}_plane"] for sample in samples])
    return {
        f"{mask}_planes": _joined([np.zeros_like(planes[0], shape=(1, *planes[0].shape[1:])), *planes]),
        f"{mask}_plane": torch.from_numpy(np.where(numbers < 0, 0, numbers + firsts[:, None])),
    }


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
