"""Images of many volumes in batches of one size, read ahead in threads, cropped and resized on the device."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from monai.data import MetaTensor

from common.ct.rejection import RejectedError, RejectedVolume
from common.embeddings.store import stored_volumes
from common.embeddings.work import CTSlices, CTSource, Work
from common.run.process import wait_for_ranks
from common.transforms.hounsfield import HUWindow, normalize_hu
from common.transforms.slice_strategies import SliceStrategy, body_box

# Z slices of a volume, H side of a slice, B images of a batch, I side of an image


SLICE_AXES = ("yx", "xy")
DECODED_BYTES = 2**30
"""Decoded volumes that wait, at most, beside one a reading thread: our choice, seven of 300 slices."""


class VolumeTask(NamedTuple):
    """One volume under one strategy.

    Args:
        volume: name.
        strategy: how its slices become images.
        num_slices: Z.
        spacing_mm: (x, y, z).
        metadata: JSON values to keep: ``slice_axes``, ``side_px`` of a slice padded to a square, and the
            ``box`` (top, left, side) of the body in it, of canonical slices whatever ``slice_axes``; no box
            where the strategy shows whole slices. ``doubts`` and ``blank_slices`` where there are any.
    """

    volume: str
    strategy: SliceStrategy
    num_slices: int
    spacing_mm: tuple[float, float, float]
    metadata: dict[str, Any]


class Piece(NamedTuple):
    """Images of a batch that belong to one task.

    Args:
        task: the task.
        first: place of its first image among the task's.
        num_images: how many.
    """

    task: VolumeTask
    first: int
    num_images: int


class SliceBatches:
    """Iterate over batches of images, filled across volumes, so that all of a strategy have one shape.

    Only the last batch of a strategy, or one before images of another side, is smaller, unless it is padded
    with empty images. All strategies of a volume share its reading and its body box. A volume that cannot be
    read is appended to ``rejected`` and passed over.

    Args:
        work: volumes and strategies.
        window: HU window of the encoder.
        slice_axes: "yx" shows rows anterior to posterior and columns right to left; "xy" transposes each
            slice, which is what the released DALE-CT weights were trained on.
        slices_per_batch: B, images of a batch; of tiles as many whole slices as it holds.
        num_workers: threads that read ahead; 0 reads when needed.
        device: where images are made.
        padded: fill the last batch of a strategy whose images all have one side, for a compiled encoder.

    Yields:
        ``image`` float32 ``(B, 1, I, I)`` on the device, or fewer, ``pieces`` (list of :class:`Piece`, first
        images first) and ``is_fixed``, whether the strategy's images all have this side.

    Raises:
        ValueError: if ``slice_axes`` is unknown or a batch holds no slice.
    """

    def __init__(
        self,
        work: Sequence[Work],
        window: HUWindow,
        slice_axes: str,
        slices_per_batch: int,
        num_workers: int,
        device: torch.device,
        padded: bool,
    ) -> None:
        if slice_axes not in SLICE_AXES:
            raise ValueError(f"slice_axes must be one of {SLICE_AXES}, got '{slice_axes}'.")
        self.work = work
        self.window = window
        self.slice_axes = slice_axes
        self.num_workers = num_workers
        self.device = torch.device(device)
        self.padded = padded
        self.slices_of: dict[str, int] = {}
        for strategy in {strategy for item in work for strategy in item.strategies}:
            self.slices_of[strategy.name] = slices_per_batch // strategy.num_images
            if self.slices_of[strategy.name] < 1:
                raise ValueError(
                    f"slices_per_batch must hold the {strategy.num_images} images of a slice of "
                    f"'{strategy.name}', got {slices_per_batch}."
                )
        self.rejected: list[RejectedVolume] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: dict[str, _Waiting] = {}
        for item, (ct, box) in self._read_ahead():
            hu = torch.from_numpy(ct.hu)
            for strategy in item.strategies:
                metadata = {"slice_axes": self.slice_axes, "side_px": hu.shape[-1]}
                metadata |= {"box": list(box)} if box is not None and strategy.is_cropped else {}
                metadata |= ct.notes
                task = VolumeTask(item.source.volume, strategy, len(hu), ct.spacing_mm, metadata)
                region = strategy.region(hu, box or (0, 0, hu.shape[-1]))
                batch = waiting.setdefault(strategy.name, _Waiting(self.slices_of[strategy.name]))
                yield from self._fill(batch, task, region)
            del ct, hu, region  # or the volume would stay in memory while the next is waited for
        for batch in waiting.values():
            yield from self._rest(batch)

    def _fill(self, batch: "_Waiting", task: VolumeTask, region: torch.Tensor) -> Iterator[dict[str, Any]]:
        """Add the slices of a volume to the images that wait, and yield the batches that get full."""
        strategy = task.strategy
        if batch.images and batch.images[0].shape[-1] != strategy.side_px(region.shape[-1]):
            yield from self._rest(batch)
        first = 0
        while first < len(region):
            count = min(batch.room, len(region) - first)
            chunk = region[first : first + count]
            if self.slice_axes == "xy":
                chunk = chunk.transpose(1, 2)
            if self.device.type == "cuda":
                chunk = chunk.contiguous().pin_memory().to(self.device, non_blocking=True)
            images = normalize_hu(strategy(chunk), self.window)
            batch.add(images, Piece(task, first * strategy.num_images, len(images)), count)
            first += count
            if batch.room == 0:
                yield batch.take()

    def _rest(self, batch: "_Waiting") -> Iterator[dict[str, Any]]:
        """Yield what waits, padded to a whole batch if that is of use."""
        if batch.images:
            last, strategy = batch.images[-1], batch.pieces[-1].task.strategy
            if self.padded and strategy.is_fixed:
                batch.images.append(last.new_zeros(batch.room * strategy.num_images, *last.shape[1:]))
            yield batch.take()

    def _read_ahead(self) -> Iterator[tuple[Work, "_Decoded"]]:
        """Read volumes in their order, some in advance, and drop those that cannot be read."""
        if self.num_workers == 0:
            for item in self.work:
                yield from self._checked(item, partial(_decode, item))
            return
        with ThreadPoolExecutor(self.num_workers, "read_ct") as pool:
            pending: deque[tuple[Work, Future[_Decoded]]] = deque()
            todo = iter(self.work)
            try:
                while self._top_up(pending, todo, pool):
                    item, future = pending.popleft()
                    yield from self._checked(item, future.result)
                    del future  # or its volume would stay in memory while the next is waited for
            finally:
                for _, future in pending:
                    future.cancel()

    def _top_up(
        self, pending: "deque[tuple[Work, Future[_Decoded]]]", todo: Iterator[Work], pool: ThreadPoolExecutor
    ) -> bool:
        """Start to read as long as a thread is free and memory is left; tell whether anything is pending."""
        while True:
            done = [future for _, future in pending if future.done()]
            decoded = sum(future.result()[0].hu.nbytes for future in done if future.exception() is None)
            if len(pending) - len(done) >= self.num_workers or decoded >= DECODED_BYTES:
                break
            item = next(todo, None)
            if item is None:
                break
            pending.append((item, pool.submit(_decode, item)))
        return bool(pending)

    def _checked(self, item: Work, decode: Callable[[], "_Decoded"]) -> Iterator[tuple[Work, "_Decoded"]]:
        """Yield a volume, or note why there is none."""
        try:
            decoded = decode()
        except RejectedError as error:
            self.rejected.append(error.of(item.source.volume))
        except (OSError, ValueError) as error:
            self.rejected.append(RejectedError("unreadable", str(error)).of(item.source.volume))
        else:
            yield item, decoded


_Decoded = tuple[CTSlices, tuple[int, int, int] | None]


def _decode(item: Work) -> _Decoded:
    """Read a volume and find its body, if a strategy asks for it."""
    ct = item.source.read()
    is_cropped = any(strategy.is_cropped for strategy in item.strategies)
    return ct, body_box(torch.from_numpy(ct.hu)) if is_cropped else None


class _Waiting:
    """Images that wait for a batch of one strategy.

    Args:
        num_slices: of a batch.
    """

    def __init__(self, num_slices: int) -> None:
        self.num_slices = self.room = num_slices
        self.images: list[torch.Tensor] = []
        self.pieces: list[Piece] = []

    def add(self, images: torch.Tensor, piece: Piece, num_slices: int) -> None:
        self.images.append(images)
        self.pieces.append(piece)
        self.room -= num_slices

    def take(self) -> dict[str, Any]:
        """Return the batch and begin another."""
        batch = {
            "image": torch.cat(self.images) if len(self.images) > 1 else self.images[0],
            "pieces": self.pieces,
            "is_fixed": self.pieces[0].task.strategy.is_fixed,
        }
        self.images, self.pieces, self.room = [], [], self.num_slices
        return batch


# X Y Z voxels of a volume: to the left, to the back, to the head


def unembedded(sources: Sequence[CTSource], output_dir: str | Path) -> list[CTSource]:
    """List this process's share of the volumes that are not embedded yet.

    With several processes (torchrun) every n-th volume falls to each. They agree, as none of them writes
    before all have looked.

    Args:
        sources: all volumes.
        output_dir: folder of the embedding store.
    """
    done = stored_volumes(output_dir)
    work = [source for source in sources if source.volume not in done]
    wait_for_ranks()
    return work[idist.get_rank() :: idist.get_world_size()]


def lps_volume(ct: CTSlices) -> MetaTensor:
    """Give canonical slices the affine that MONAI's spatial transforms go by.

    Args:
        ct: canonical slices.

    Returns:
        HU, float32 ``(1, X, Y, Z)``, with the spacing in its affine and the first voxel at the origin.

    Example:
        >>> import numpy as np
        >>> volume = lps_volume(CTSlices(np.zeros((5, 3, 3), np.int16), (0.7, 0.8, 2.0)))
        >>> volume.shape, volume.affine.diagonal().tolist()
        (torch.Size([1, 3, 3, 5]), [-0.7, -0.8, 2.0, 1.0])
    """
    x, y, z = ct.spacing_mm
    affine = torch.diag(torch.tensor([-x, -y, z, 1.0], dtype=torch.float64))
    return MetaTensor(torch.from_numpy(ct.hu).permute(2, 1, 0).float()[None], affine=affine)


class VolumeBatches:
    """Iterate over volumes as a 3D encoder wants them, one a batch.

    A volume that cannot be read is appended to ``rejected`` and passed over.

    Args:
        work: volumes.
        transform: from ``{"image": lps_volume}`` to ``{"image": (1, ...)}``, an encoder's input.
        num_workers: threads that read and transform ahead, a volume each; 0 does so when needed.

    Yields:
        ``image (1, 1, ...)``; ``volume``, ``spacing_mm`` (x, y, z) and ``notes`` (doubts) of the CT.
    """

    def __init__(
        self,
        work: Sequence[CTSource],
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        num_workers: int,
    ) -> None:
        self.work = list(work)
        self.transform = transform
        self.num_workers = num_workers
        self.rejected: list[RejectedVolume] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.num_workers == 0:
            for source in self.work:
                yield from self._checked(source, partial(self._prepare, source))
            return
        with ThreadPoolExecutor(self.num_workers, "read_ct") as pool:
            todo = iter(self.work)
            pending: deque[tuple[CTSource, Future[dict[str, Any]]]] = deque()
            try:
                pending.extend((s, pool.submit(self._prepare, s)) for s in islice(todo, self.num_workers))
                while pending:
                    source, future = pending.popleft()
                    yield from self._checked(source, future.result)
                    del future  # or its volume would stay in memory while the next is waited for
                    pending.extend((s, pool.submit(self._prepare, s)) for s in islice(todo, 1))
            finally:
                for _, future in pending:
                    future.cancel()

    def _prepare(self, source: CTSource) -> dict[str, Any]:
        ct = source.read()
        image = self.transform({"image": lps_volume(ct)})["image"]
        about = {"volume": source.volume, "spacing_mm": ct.spacing_mm, "notes": ct.notes}
        return {"image": image[None], **about}

    def _checked(self, source: CTSource, prepare: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield a volume, or note why there is none."""
        try:
            batch = prepare()
        except RejectedError as error:
            self.rejected.append(error.of(source.volume))
        except (OSError, ValueError) as error:
            self.rejected.append(RejectedError("unreadable", str(error)).of(source.volume))
        else:
            yield batch
