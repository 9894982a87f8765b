"""Write the embeddings of each volume while the next are encoded, and say what came of a run."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from tqdm import tqdm

from common.ct.rejection import RejectedError, RejectedVolume, is_failure
from common.embeddings.ct_batches import Piece, SliceBatches, VolumeTask
from common.embeddings.store import DTYPES, EmbeddingStoreWriter, check_finite
from common.embeddings.work import log_embedded, report_doubts, report_rejected

# B images of a batch, N images of a volume, P patches of one, D embedding


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


logger = logging.getLogger(__name__)

MAX_WAITING = 4
"""Volumes that may wait for the disk before the encoder waits for them."""


class EmbeddingWriter:
    """Write the outputs of a ``SlicesInferer`` on ``SliceBatches`` into an embedding store a strategy.

    Tokens are CLS per slice, feet to head, with the slices' positions in mm, and patch tokens where the
    inferer gives some. A thread of its own joins and writes; a bar shows volumes and slices a second.

    At the end, rank 0 lists the volumes of all ranks that could not be embedded in ``rejected.csv``, or
    removes that of an earlier run. What was added before an error or Ctrl-C is written.

    Args:
        folders: store of each strategy, see ``store_folders``.
        output_dir: folder of ``rejected.csv``.
        identity: of the embeddings, all but ``preprocessing``, which is the strategy.
        dtype: "float16" or "float32", type the embeddings are stored in.
        batches: that the engine runs on.
        num_volumes: of the whole run, all ranks and those that were embedded before.
        rejected: volumes that were left out before the run.
        max_rejected: share of volumes that may fail.

    Raises:
        ValueError: at the end of the run, if more failed; at its start, if a folder holds embeddings of
            another origin.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        output_dir: str | Path,
        identity: Mapping[str, Any],
        dtype: str,
        batches: SliceBatches,
        num_volumes: int,
        rejected: Sequence[RejectedVolume],
        max_rejected: float,
    ) -> None:
        self.writers = {
            name: EmbeddingStoreWriter(folder, {**identity, "preprocessing": name}, dtype)
            for name, folder in folders.items()
        }
        self.output_dir = Path(output_dir)
        self.batches = batches
        self.num_volumes = num_volumes + sum(map(is_failure, rejected))
        self.rejected = list(rejected) if idist.get_rank() == 0 else []  # every rank lists the same
        self.max_rejected = max_rejected
        self.outputs = VolumeOutputs(DTYPES[dtype])
        self.num_embedded = self.num_slices = 0

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._stop)

    def _start(self, engine: Engine) -> None:
        self.pool = ThreadPoolExecutor(1, "write_embeddings")
        self.writing: deque[Future[None]] = deque()
        self.started = time.monotonic()
        self.per_volume = {item.source.volume: len(item.strategies) for item in self.batches.work}
        self.total = sum(self.per_volume.values())
        self.bar = tqdm(total=self.total, unit="volume", dynamic_ncols=True, disable=idist.get_rank() > 0)

    def _take(self, engine: Engine) -> None:
        state: Any = engine.state
        cls, patches = state.output[CommonKeys.PRED]
        self.bar.total = self.total - sum(self.per_volume[lost.volume] for lost in self.batches.rejected)
        self._submit(self.outputs.add(state.batch["pieces"], cls, patches))

    def _submit(self, volumes: Any) -> None:  # noqa: ANN401 (an iterator of volumes)
        for volume in volumes:
            self.writing.append(self.pool.submit(self._write, volume))
        while self.writing and (self.writing[0].done() or len(self.writing) > MAX_WAITING):
            self.writing.popleft().result()  # raises what went wrong in the thread

    def _write(self, volume: VolumeOutput) -> None:
        task, cls, patches = volume
        strategy = task.strategy
        metadata = dict(task.metadata)
        if patches is not None:
            rows = int(patches.shape[1] ** 0.5)
            metadata["patch_grid"] = [rows, rows]
        z_mm = strategy.z_mm(torch.arange(task.num_slices) * float(task.spacing_mm[2]))
        try:
            for name, tensor in (("tokens", cls), ("patches", patches)):
                if tensor is not None:
                    check_finite(tensor, name, task.volume)
        except ValueError as error:
            self.rejected.append(RejectedError("embedding", str(error)).of(task.volume))
        else:
            self.writers[strategy.name].add(
                task.volume, strategy.tokens(cls), task.spacing_mm, z_mm=z_mm, patches=patches, **metadata
            )
            self.num_embedded += 1
            self.num_slices += task.num_slices
        self.bar.update()
        speed = self.num_slices / (time.monotonic() - self.started)
        self.bar.set_postfix({"slices/s": f"{speed:.3g}"}, refresh=False)

    def _close(self) -> None:
        self.pool.shutdown()
        self.bar.close()
        for writer in self.writers.values():
            writer.close()

    def _stop(self, engine: Engine, error: BaseException) -> None:
        self._close()
        raise error

    def _finish(self, engine: Engine) -> None:
        self._submit(self.outputs.rest())
        for future in self.writing:
            future.result()
        self._close()
        seconds = time.monotonic() - self.started
        logger.info(
            "Embedded %d volumes, %d slices, in %.1f s: %.3g slices/s.",
            *(self.num_embedded, self.num_slices, seconds, self.num_slices / seconds),
        )
        rejected = [*self.rejected, *self.batches.rejected]
        failed = report_rejected(self.output_dir, rejected, self.num_volumes, self.max_rejected)
        report_doubts(next(iter(self.writers.values())).folder)
        log_embedded(self.output_dir, self.num_volumes, failed)
