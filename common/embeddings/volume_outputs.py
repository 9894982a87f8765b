"""Put the encoder's outputs, which come in batches across volumes, together by volume."""

# B images of a batch, N images of a volume, P patches of one, D embedding

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from common.embeddings.slice_batches import Piece, VolumeTask

BATCHES_IN_FLIGHT = 2
"""Batches whose outputs may be on their way from a GPU before the oldest is waited for."""


class VolumeOutput(NamedTuple):
    """All images of a volume under one strategy.

    Args:
        task: the volume.
        cls: ``(N, D)``.
        patches: ``(N, P, D)``, or None.
    """

    task: VolumeTask
    cls: torch.Tensor
    patches: torch.Tensor | None


class VolumeOutputs:
    """Collect batches and give back the volumes that are complete.

    From a GPU, outputs are copied while the next batch is computed.

    Args:
        dtype: type to keep them in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._in_flight: deque[_Batch] = deque()
        self._collected: dict[tuple[str, str], tuple[VolumeOutput, int]] = {}

    def add(
        self, pieces: Sequence[Piece], cls: torch.Tensor, patches: torch.Tensor | None
    ) -> Iterator[VolumeOutput]:
        """Take a batch; yield what is complete by now.

        Args:
            pieces: whose images they are, in order; what follows them is padding.
            cls: CLS of the images.
            patches: their patch tokens, or None.

        Shape:
            ``cls (B, D)``, ``patches (B, P, D)``.
        """
        used = sum(piece.num_images for piece in pieces)
        tensors = [None if output is None else self._copy(output[:used]) for output in (cls, patches)]
        event = torch.cuda.Event() if cls.is_cuda else None
        if event is not None:
            event.record()
        assert tensors[0] is not None
        self._in_flight.append(_Batch(pieces, tensors[0], tensors[1], event))
        while self._in_flight and (event is None or len(self._in_flight) > BATCHES_IN_FLIGHT):
            yield from self._collect(self._in_flight.popleft())

    def rest(self) -> Iterator[VolumeOutput]:
        """Yield what is complete once all batches are there."""
        while self._in_flight:
            yield from self._collect(self._in_flight.popleft())

    def _copy(self, output: torch.Tensor) -> torch.Tensor:
        output = output.detach().to(self.dtype)
        if not output.is_cuda:
            return output
        return torch.empty(output.shape, dtype=self.dtype, pin_memory=True).copy_(output, non_blocking=True)

    def _collect(self, batch: "_Batch") -> Iterator[VolumeOutput]:
        if batch.event is not None:
            batch.event.synchronize()
        start = 0
        for piece in batch.pieces:
            rows = slice(start, start + piece.num_images)
            start += piece.num_images
            volume, missing = self._collected.pop(_key(piece.task), (None, 0)) if piece.first else (None, 0)
            if volume is None:
                volume, missing = _empty(piece.task, batch)
            place = slice(piece.first, piece.first + piece.num_images)
            volume.cls[place] = batch.cls[rows]
            if volume.patches is not None and batch.patches is not None:
                volume.patches[place] = batch.patches[rows]
            missing -= piece.num_images
            if missing == 0:
                yield volume
            else:
                self._collected[_key(piece.task)] = (volume, missing)


class _Batch(NamedTuple):
    """Outputs on the host, valid once the event has happened."""

    pieces: Sequence[Piece]
    cls: torch.Tensor
    patches: torch.Tensor | None
    event: torch.cuda.Event | None


def _key(task: VolumeTask) -> tuple[str, str]:
    return task.volume, task.strategy.name


def _empty(task: VolumeTask, batch: _Batch) -> tuple[VolumeOutput, int]:
    """Room for the outputs of a volume, and the number that is missing."""
    num_images = task.num_slices * task.strategy.num_images
    cls = batch.cls.new_empty(num_images, batch.cls.shape[1])
    patches = None if batch.patches is None else batch.patches.new_empty(num_images, *batch.patches.shape[1:])
    return VolumeOutput(task, cls, patches), num_images
