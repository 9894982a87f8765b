"""Images of many volumes in batches of one size, read ahead in threads, cropped and resized on the device."""

# Z slices of a volume, H side of a slice, B images of a batch, I side of an image

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from common.ct.rejection import RejectedError, RejectedVolume
from common.embeddings.sources import CTSlices
from common.embeddings.work import Work
from common.transforms.body_crop import body_box
from common.transforms.hounsfield import HUWindow, normalize_hu
from common.transforms.slice_strategies import SliceStrategy

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
