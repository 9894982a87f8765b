"""Write the embeddings of each volume while the next are encoded, and say what came of a run."""

# B images of a batch, N images of a volume, P patches of one, D embedding

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from common.ct.rejection import RejectedError, RejectedVolume, is_failure
from common.embeddings.ct_batches import Piece, SliceBatches, Task, VolumeBatches
from common.embeddings.store import DTYPES, Embedding, EmbeddingStoreWriter
from common.embeddings.work import report_embedded, report_rejected
from common.run.process import rank_and_ranks

if TYPE_CHECKING:
    from ignite.engine import Engine

BATCHES_IN_FLIGHT = 2
"""Batches whose outputs may be on their way from a GPU before the oldest is waited for."""

NOT_EMBEDDED = "embedding"  # reason for rejecting a volume whose tokens are not finite
MAX_WAITING = 4
"""Volumes that may wait for the disk before the encoder waits for them."""


class VolumeOutput(NamedTuple):
    """What an encoder made of all images of a volume: ``(N, D)``, with patches ``(N, P, D)`` or None."""

    task: Task
    encoded: torch.Tensor
    patches: torch.Tensor | None


class _Batch(NamedTuple):
    """Outputs on the host, valid once the event has happened."""

    pieces: Sequence[Piece]
    encoded: torch.Tensor
    patches: torch.Tensor | None
    event: torch.cuda.Event | None


class VolumeOutputs:
    """Collect the outputs of batches and give back the volumes that are complete.

    From a GPU, outputs are copied while the next batch is computed.

    Args:
        dtype: type to keep them in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._in_flight: deque[_Batch] = deque()
        self._collected: dict[tuple[str, str], VolumeOutput] = {}

    def add(
        self, pieces: Sequence[Piece], encoded: torch.Tensor, patches: torch.Tensor | None
    ) -> Iterator[VolumeOutput]:
        """Take a batch; yield what is complete by now.

        Args:
            pieces: pieces of the batch, in order; what follows them is padding.
            encoded: CLS of the images ``(B, D)``, or a grid of tokens ``(1, D, G0, G1, G2)``.
            patches: patch tokens of the images ``(B, P, D)``, or None.
        """
        used = sum(piece.num_images for piece in pieces)
        copies = [None if output is None else self._copy(output[:used]) for output in (encoded, patches)]
        event = torch.cuda.Event() if encoded.is_cuda else None
        if event is not None:
            event.record()
        assert copies[0] is not None
        self._in_flight.append(_Batch(pieces, copies[0], copies[1], event))
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

    def _collect(self, batch: _Batch) -> Iterator[VolumeOutput]:
        if batch.event is not None:
            batch.event.synchronize()
        start = 0
        for task, first, num_images in batch.pieces:
            key = task.volume, task.store
            rows, place = slice(start, start + num_images), slice(first, first + num_images)
            start += num_images
            if first == 0:
                self._collected[key] = VolumeOutput(
                    task,
                    batch.encoded.new_empty(task.num_images, *batch.encoded.shape[1:]),
                    None
                    if batch.patches is None
                    else batch.patches.new_empty(task.num_images, *batch.patches.shape[1:]),
                )
            volume = self._collected[key]
            volume.encoded[place] = batch.encoded[rows]
            if volume.patches is not None and batch.patches is not None:
                volume.patches[place] = batch.patches[rows]
            if first + num_images == task.num_images:
                yield self._collected.pop(key)


def embedding_of(volume: VolumeOutput) -> Embedding:
    """Put together the embedding of a volume from what the encoder made of its images."""
    task, encoded, patches = volume
    metadata = {"volume": task.volume, "spacing_mm": [float(mm) for mm in task.spacing_mm], **task.metadata}
    if task.strategy is None:
        metadata["grid_shape"] = list(encoded.shape[2:])
        tokens, z_mm = encoded[0].flatten(1).T, None
    else:
        slices = torch.arange(task.num_images // task.strategy.num_images)
        tokens = task.strategy.tokens(encoded)
        z_mm = task.strategy.z_mm(slices * float(task.spacing_mm[2]))
    if patches is not None:
        metadata["patch_grid"] = 2 * [math.isqrt(patches.shape[1])]
    return Embedding(tokens, z_mm, metadata, patches)


class EmbeddingWriter:
    """Write what an inferer gives on ``SliceBatches`` or ``VolumeBatches`` into the stores of a run.

    Tokens of slices are CLS per slice, feet to head, with the slices' positions in mm, and patch tokens where
    the inferer gives some; those of a 3D encoder are its grid, row-major. A thread of its own joins and
    writes; a bar shows volumes and slices per second.

    At the end, rank 0 lists the volumes of all ranks that could not be embedded in ``rejected.csv``, or
    removes that of an earlier run. What was added before an error or Ctrl-C is written.

    Args:
        folders: folders of the stores, see ``store_folders``.
        output_dir: folder of ``rejected.csv``.
        identity: identity of the embeddings, all but ``preprocessing``, which is the store's name.
        dtype: "float16" or "float32", type the embeddings are stored in.
        batches: batches that the engine runs on.
        num_volumes: number of volumes of the whole run, all ranks and those that were embedded before.
        rejected: volumes that were left out before the run.
        max_rejected: share of volumes that may fail.

    Raises:
        ValueError: at the end of the run, if more failed; at its start, if a folder holds embeddings of
            another origin.
    """

    def __init__(
        self,
        *,
        folders: Mapping[str, Path],
        output_dir: str | Path,
        identity: Mapping[str, Any],
        dtype: str,
        batches: SliceBatches | VolumeBatches,
        num_volumes: int,
        rejected: Sequence[RejectedVolume],
        max_rejected: float,
    ) -> None:
        self.writers = {
            name: EmbeddingStoreWriter(folder, {**identity, "preprocessing": name}, dtype)
            for name, folder in folders.items()
        }
        self.output_dir, self.folders = output_dir, list(folders.values())
        self.batches = batches
        self.num_volumes = num_volumes + sum(map(is_failure, rejected))
        if rank_and_ranks()[0] == 0:  # every rank lists the same
            batches.rejected += rejected
        self.max_rejected = max_rejected
        self.outputs = VolumeOutputs(DTYPES[dtype])
        self.num_slices = 0

    def attach(self, engine: "Engine") -> None:
        """Register with an Ignite engine."""
        from ignite.engine import Events
        from monai.utils import CommonKeys

        def take(engine: "Engine") -> None:
            state: Any = engine.state
            self.take(state.batch["pieces"], *state.output[CommonKeys.PRED])

        def stop(engine: "Engine", error: BaseException) -> None:
            self.close()
            raise error

        engine.add_event_handler(Events.STARTED, lambda engine: self.start())
        engine.add_event_handler(Events.ITERATION_COMPLETED, take)
        engine.add_event_handler(Events.COMPLETED, lambda engine: self.finish())
        engine.add_event_handler(Events.EXCEPTION_RAISED, stop)

    def start(self) -> None:
        """Begin a run."""
        self.pool = ThreadPoolExecutor(1, "write_embeddings")
        self.writing: deque[Future[None]] = deque()
        self.started = time.monotonic()
        self.num_stores = {source.volume: len(source.stores) for source in self.batches.work}
        total = sum(self.num_stores.values())
        self.bar = tqdm(total=total, unit="volume", dynamic_ncols=True, disable=rank_and_ranks()[0] > 0)

    def take(self, pieces: Sequence[Piece], encoded: torch.Tensor, patches: torch.Tensor | None) -> None:
        """Take what the encoder made of a batch, as :meth:`VolumeOutputs.add`."""
        unread = [item.volume for item in self.batches.rejected if item.reason != NOT_EMBEDDED]
        lost = sum(self.num_stores.get(volume, 0) for volume in unread)
        self.bar.total = sum(self.num_stores.values()) - lost
        self._submit(self.outputs.add(pieces, encoded, patches))

    def _submit(self, volumes: Iterable[VolumeOutput]) -> None:
        for volume in volumes:
            self.writing.append(self.pool.submit(self._write, volume))
        while self.writing and (self.writing[0].done() or len(self.writing) > MAX_WAITING):
            self.writing.popleft().result()  # raises what went wrong in the thread

    def _write(self, volume: VolumeOutput) -> None:
        task, embedding = volume.task, embedding_of(volume)
        if task.strategy is not None:
            self.num_slices += task.num_images // task.strategy.num_images
        try:
            tokens, z_mm, metadata, patches = embedding
            names = {"volume": metadata.pop("volume"), "spacing_mm": metadata.pop("spacing_mm")}
            self.writers[task.store].add(**names, tokens=tokens, z_mm=z_mm, patches=patches, **metadata)
        except ValueError as error:
            self.batches.rejected.append(RejectedError(NOT_EMBEDDED, str(error)).of(task.volume))
        self.bar.update()
        if self.num_slices:
            speed = self.num_slices / (time.monotonic() - self.started)
            self.bar.set_postfix({"slices/s": f"{speed:.3g}"}, refresh=False)

    def close(self) -> None:
        """Write what was taken, after an error, too."""
        self.pool.shutdown()
        self.bar.close()
        for writer in self.writers.values():
            writer.close()

    def finish(self) -> None:
        """Write the rest, and say what came of the run."""
        self._submit(self.outputs.rest())
        for future in self.writing:
            future.result()
        self.close()
        failed = report_rejected(self.output_dir, self.batches.rejected, self.num_volumes, self.max_rejected)
        report_embedded(self.output_dir, self.folders, self.num_volumes, failed)
