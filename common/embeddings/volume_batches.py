"""Volumes for a 3D encoder, one a batch, read ahead in threads."""

# X Y Z voxels of a volume: to the left, to the back, to the head

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.data import MetaTensor

from common.ct.rejection import RejectedError, RejectedVolume
from common.embeddings.sources import CTSlices, CTSource
from common.embeddings.store import stored_volumes
from common.run.distributed import wait_for_ranks


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
