"""CTs as batches of an encoder's input: read ahead in threads, cropped and resized on the device."""

# Z slices of a volume, H side of a slice, B images of a batch, I side of an image
# X Y Z voxels of a volume: to the left, to the back, to the head

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from common.ct.rejection import RejectedError, RejectedVolume
from common.embeddings.work import CTSlices, CTSource
from common.transforms.hounsfield import HUWindow, normalize_hu
from common.transforms.slice_strategies import SliceStrategy, body_box

if TYPE_CHECKING:
    from monai.data import MetaTensor

SLICE_AXES = ("yx", "xy")
CPU_SLICES = 16  # of 512 x 512 in float32, 16 MB
DECODED_BYTES = 2**30
"""Decoded volumes that wait, at most, besides one per reading thread: our choice, seven of 300 slices."""


class Task(NamedTuple):
    """One volume for one store: what is known of its embedding before the encoder has run.

    Args:
        volume: name of the volume.
        store: name of the store.
        num_images: images that are encoded, 1 for a 3D encoder.
        spacing_mm: (x, y, z).
        metadata: JSON values to keep.
        strategy: how slices became images; None for a 3D encoder.
    """

    volume: str
    store: str
    num_images: int
    spacing_mm: tuple[float, float, float]
    metadata: dict[str, Any]
    strategy: SliceStrategy | None = None


class Piece(NamedTuple):
    """Images of a batch that belong to one task: number ``first`` and following."""

    task: Task
    first: int
    num_images: int


class Prepared(NamedTuple):
    """A volume that was read in a thread.

    Args:
        pixels: slices ``(Z, H, H)`` in HU, or the input of a 3D encoder.
        spacing_mm: (x, y, z).
        notes: JSON values of :class:`CTSlices` to keep.
        box: top, left and side of the body, if a strategy needs it.
    """

    pixels: torch.Tensor
    spacing_mm: tuple[float, float, float]
    notes: dict[str, Any]
    box: tuple[int, int, int] | None = None


def read_ahead(
    work: Iterable[CTSource],
    prepare: Callable[[CTSource], Prepared],
    num_workers: int,
    rejected: list[RejectedVolume],
) -> Iterator[tuple[CTSource, Prepared]]:
    """Read volumes in their order, some in advance; those that cannot be read are passed over.

    Args:
        work: volumes.
        prepare: reads one, in a thread.
        num_workers: threads; 0 reads when a volume is needed.
        rejected: list to which volumes that cannot be read are appended.
    """
    if num_workers == 0:
        for source in work:
            yield from _checked(source, partial(prepare, source), rejected)
        return
    with ThreadPoolExecutor(num_workers, "read_ct") as pool:
        pending: deque[tuple[CTSource, Future[Prepared]]] = deque()
        todo = iter(work)
        try:
            while True:
                while _has_room(pending, num_workers) and (following := next(todo, None)) is not None:
                    pending.append((following, pool.submit(prepare, following)))
                if not pending:
                    return
                source, future = pending.popleft()
                yield from _checked(source, future.result, rejected)
                del future  # or its volume would stay in memory while the next is waited for
        finally:
            for _, future in pending:
                future.cancel()


def _has_room(pending: Sequence[tuple[CTSource, "Future[Prepared]"]], num_workers: int) -> bool:
    """Tell whether a thread is free and memory is left."""
    done = [future for _, future in pending if future.done()]
    decoded = sum(future.result().pixels.nbytes for future in done if future.exception() is None)
    return len(pending) - len(done) < num_workers and decoded < DECODED_BYTES


def _checked(
    source: CTSource, result: Callable[[], Prepared], rejected: list[RejectedVolume]
) -> Iterator[tuple[CTSource, Prepared]]:
    """Yield a volume, or note why there is none."""
    try:
        prepared = result()
    except RejectedError as error:
        rejected.append(error.of(source.volume))
    except (OSError, ValueError) as error:
        rejected.append(RejectedError("unreadable", str(error)).of(source.volume))
    else:
        yield source, prepared


def read_slices(source: CTSource, is_cropped: bool) -> Prepared:
    """Read a volume as slices, and find the body in them where a strategy crops to it."""
    ct = source.read()
    hu = torch.from_numpy(ct.hu)
    return Prepared(hu, ct.spacing_mm, ct.notes, body_box(hu) if is_cropped else None)


class SliceBatches:
    """Iterate over batches of images, filled across volumes, so that all of a strategy have one shape.

    Only the last batch of a strategy, or one before images of another side, is smaller, unless it is padded
    with empty images. All strategies of a volume share its reading and its body box.

    Metadata: ``slice_axes``, ``side_px`` of a slice padded to a square, and the ``box`` (top, left, side) of
    the body in it, of canonical slices whatever ``slice_axes``; no box where the strategy shows whole slices.

    Attributes:
        rejected: volumes that could not be read, or embedded.

    Args:
        work: volumes, and the strategies that lack them.
        strategies: strategies of the run.
        window: HU window of the encoder.
        slice_axes: "yx" shows rows anterior to posterior and columns right to left; "xy" transposes each
            slice, which is what the released DALE-CT weights were trained on.
        slices_per_batch: B, images of a batch; of tiles as many whole slices as it holds.
        num_workers: threads that read ahead; 0 reads when needed.
        device: device on which images are made.
        padded: whether to fill the last batch of a strategy whose images all have one side, for a compiled
            encoder.

    Yields:
        ``image`` float32 ``(B, 1, I, I)`` on the device, or fewer, ``pieces`` (list of :class:`Piece`, first
        images first) and ``is_fixed``, whether the strategy's images all have this side.

    Raises:
        ValueError: if ``slice_axes`` is unknown or a batch holds no slice.
    """

    def __init__(
        self,
        *,
        work: Sequence[CTSource],
        strategies: Sequence[SliceStrategy],
        window: HUWindow,
        slice_axes: str,
        slices_per_batch: int,
        num_workers: int,
        device: torch.device,
        padded: bool,
    ) -> None:
        if slice_axes not in SLICE_AXES:
            raise ValueError(f"slice_axes must be one of {SLICE_AXES}, got '{slice_axes}'.")
        for strategy in strategies:
            if slices_per_batch < strategy.num_images:
                raise ValueError(
                    f"slices_per_batch must hold the {strategy.num_images} images of a slice of "
                    f"'{strategy.name}', got {slices_per_batch}."
                )
        self.work = work
        self.strategies = {strategy.name: strategy for strategy in strategies}
        self.window = window
        self.slice_axes = slice_axes
        self.slices_per_batch = slices_per_batch
        self.num_workers = num_workers
        self.device = torch.device(device)
        self.padded = padded
        self.rejected: list[RejectedVolume] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting = {
            name: _Waiting(strategy, self.slices_per_batch // strategy.num_images)
            for name, strategy in self.strategies.items()
        }
        for source, prepared in read_ahead(self.work, self._prepare, self.num_workers, self.rejected):
            for task, strategy, region in self.shown(source, prepared):
                yield from self._fill(waiting[strategy.name], task, region)
                del region
            del prepared  # or the volume would stay in memory while the next is waited for
        for batch in waiting.values():
            yield from self._rest(batch)

    def shown(
        self, source: CTSource, prepared: Prepared
    ) -> Iterator[tuple[Task, SliceStrategy, torch.Tensor]]:
        """Yield what of a volume is encoded: by each strategy that lacks it, the region of its slices."""
        hu, box = prepared.pixels, prepared.box
        for name in source.stores:
            strategy = self.strategies[name]
            metadata = {"slice_axes": self.slice_axes, "side_px": hu.shape[-1], **prepared.notes}
            if strategy.is_cropped and box is not None:
                metadata["box"] = list(box)
            num_images = len(hu) * strategy.num_images
            task = Task(source.volume, name, num_images, prepared.spacing_mm, metadata, strategy)
            yield task, strategy, strategy.region(hu, box)

    def _prepare(self, source: CTSource) -> Prepared:
        return read_slices(source, any(self.strategies[name].is_cropped for name in source.stores))

    def _fill(self, batch: "_Waiting", task: Task, region: torch.Tensor) -> Iterator[dict[str, Any]]:
        """Add the slices of a volume to the images that wait, and yield the batches that get full."""
        strategy = batch.strategy
        if batch.images and batch.images[0].shape[-1] != strategy.side_px(region.shape[-1]):
            yield from self._rest(batch)
        first = 0
        while first < len(region):
            chunk = region[first : first + batch.room]
            images = images_of(chunk, strategy, self.window, self.slice_axes, self.device)
            batch.images.append(images)
            batch.pieces.append(Piece(task, first * strategy.num_images, len(images)))
            batch.room -= len(chunk)
            first += len(chunk)
            if batch.room == 0:
                yield batch.take()

    def _rest(self, batch: "_Waiting") -> Iterator[dict[str, Any]]:
        """Yield what waits, padded to a whole batch if that is of use."""
        if batch.images:
            if self.padded and batch.strategy.is_fixed:
                last = batch.images[-1]
                batch.images.append(last.new_zeros(batch.room * batch.strategy.num_images, *last.shape[1:]))
            yield batch.take()


class _Waiting:
    """Images that wait for a batch of one strategy."""

    def __init__(self, strategy: SliceStrategy, num_slices: int) -> None:
        self.strategy = strategy
        self.num_slices = self.room = num_slices
        self.images: list[torch.Tensor] = []
        self.pieces: list[Piece] = []

    def take(self) -> dict[str, Any]:
        """Return the batch and begin another."""
        image = torch.cat(self.images) if len(self.images) > 1 else self.images[0]
        batch = {"image": image, "pieces": self.pieces, "is_fixed": self.strategy.is_fixed}
        self.images, self.pieces, self.room = [], [], self.num_slices
        return batch


def images_of(
    region: torch.Tensor, strategy: SliceStrategy, window: HUWindow, slice_axes: str, device: torch.device
) -> torch.Tensor:
    """Turn slices of a strategy's region ``(S, H, H)`` in HU into what an encoder takes, on its device.

    Args:
        region: what :meth:`SliceStrategy.region` leaves of the slices, on the CPU or on the device.
        strategy: how a slice becomes images.
        window: HU window of the encoder.
        slice_axes: "yx", or "xy" for transposed slices.
        device: device on which the images are made.
    """
    if slice_axes == "xy":
        region = region.transpose(1, 2)
    if device.type == "cuda" and not region.is_cuda:
        region = region.contiguous().pin_memory().to(device, non_blocking=True)
    # on a CPU in parts whose memory is used again rather than asked for anew: three times as fast, measured
    parts = region.split(CPU_SLICES if device.type == "cpu" else max(len(region), 1))
    images = [normalize_hu(strategy(part), window) for part in parts]
    return images[0] if len(images) == 1 else torch.cat(images)


class VolumeBatches:
    """Iterate over volumes as a 3D encoder wants them, one per batch.

    Attributes:
        rejected: volumes that could not be read, or embedded.

    Args:
        work: volumes.
        transform: from ``{"image": lps_volume}`` to ``{"image": (1, ...)}``, an encoder's input.
        axcodes: where the axes of the input point, such as "RAS"; kept as metadata.
        num_workers: threads that read and transform ahead, a volume each; 0 does so when needed.

    Yields:
        ``image (1, 1, ...)`` and ``pieces``, one :class:`Piece`.
    """

    def __init__(
        self,
        work: Sequence[CTSource],
        transform: Callable[[dict[str, Any]], dict[str, Any]],
        axcodes: str,
        num_workers: int,
    ) -> None:
        self.work = work
        self.transform = transform
        self.axcodes = axcodes
        self.num_workers = num_workers
        self.rejected: list[RejectedVolume] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for source, prepared in read_ahead(self.work, self._prepare, self.num_workers, self.rejected):
            metadata = {"axcodes": self.axcodes, **prepared.notes}
            for store in source.stores:
                task = Task(source.volume, store, 1, prepared.spacing_mm, metadata)
                yield {"image": prepared.pixels[None], "pieces": [Piece(task, 0, 1)]}
            del prepared  # or the volume would stay in memory while the next is waited for

    def _prepare(self, source: CTSource) -> Prepared:
        ct = source.read()
        return Prepared(self.transform({"image": lps_volume(ct)})["image"], ct.spacing_mm, ct.notes)


def lps_volume(ct: CTSlices) -> "MetaTensor":
    """Give canonical slices the affine that MONAI's spatial transforms go by.

    Returns:
        HU, float32 ``(1, X, Y, Z)``, with the spacing in its affine and the first voxel at the origin.

    Example:
        >>> import numpy as np
        >>> volume = lps_volume(CTSlices(np.zeros((5, 3, 3), np.int16), (0.7, 0.8, 2.0)))
        >>> volume.shape, volume.affine.diagonal().tolist()
        (torch.Size([1, 3, 3, 5]), [-0.7, -0.8, 2.0, 1.0])
    """
    from monai.data import MetaTensor  # here: slices need none of its seconds of imports

    x, y, z = ct.spacing_mm
    affine = torch.diag(torch.tensor([-x, -y, z, 1.0], dtype=torch.float64))
    return MetaTensor(torch.from_numpy(ct.hu).permute(2, 1, 0).float()[None], affine=affine)
