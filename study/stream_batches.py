"""How a shuffle buffer behind a stream of volumes fills batches: the ablation of our exact shuffle."""

import random
from collections.abc import Iterator
from itertools import count, islice

import numpy as np
from webdataset.filters import shuffle

from common.shards.slab_dataset import SlabViews, StepBatches


class StreamBatches(StepBatches):
    """The slabs and views of an exact shuffle, in the order of a stream of volumes through a buffer.

    A pass takes the places of a pass of ``StepBatches``, so that every slab is cut in the same views; only
    what meets in a batch differs. One process only; a resumed run goes through the stream again to its step.

    Source: the authors' loader, which shuffles 100 slabs behind whole volumes.

    Args:
        batch_size: samples a step.
        dataset: whose slabs.
        buffer_slabs: of the shuffle buffer.
        seed: of the order of volumes and of the buffer.
    """

    def __init__(self, batch_size: int, dataset: SlabViews, buffer_slabs: int, seed: int) -> None:
        super().__init__(batch_size, rank=0, world_size=1)
        self.dataset = dataset
        self.buffer_slabs = buffer_slabs
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        through = shuffle(self.buffer_slabs, initial=self.buffer_slabs, rng=random.Random(self.seed))
        mixed = islice(through(self._stream()), self.start_step * self.batch_size, None)
        while True:
            yield list(islice(mixed, self.batch_size))

    def _stream(self) -> Iterator[int]:
        """Yield the places of the run, each pass sorted by volumes in a random order, then feet to head."""
        num_slabs, num_volumes = len(self.dataset.slab_volumes), len(self.dataset.shards.volumes)
        for one_pass in count():
            places = np.arange(one_pass * num_slabs, (one_pass + 1) * num_slabs)
            volumes, starts, _ = np.array([self.dataset.slab_of(int(place)) for place in places]).T
            rank_of_volume = np.random.default_rng([self.seed, one_pass]).permutation(num_volumes)
            yield from places[np.lexsort((starts, rank_of_volume[volumes]))].tolist()
