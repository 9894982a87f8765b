from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np

from study.stream_batches import StreamBatches

VOLUMES, SLABS = 40, 40


def dataset() -> Any:
    """Places of a cohort of equal volumes, each pass in an order of its own."""
    total = VOLUMES * SLABS

    def slab_of(place: int) -> tuple[int, int, int]:
        one_pass, element = divmod(place, total)
        slab = int(np.random.default_rng([7, one_pass]).permutation(total)[element])
        return slab // SLABS, slab % SLABS, 1

    return SimpleNamespace(
        slab_volumes=np.repeat(np.arange(VOLUMES), SLABS),
        slab_of=slab_of,
        shards=SimpleNamespace(volumes=range(VOLUMES)),
    )


def batches(seed: int = 0, buffer_slabs: int = 100) -> StreamBatches:
    return StreamBatches(batch_size=16, dataset=dataset(), buffer_slabs=buffer_slabs, seed=seed)


def test_every_place_comes_once_and_none_long_before_its_pass():
    total = VOLUMES * SLABS
    taken = [place for batch in islice(batches(), 4 * total // 16) for place in batch]
    assert max(Counter(taken).values()) == 1
    missing = set(range(3 * total)) - set(taken)
    assert len(missing) <= 100  # those that the buffer holds


def test_a_batch_holds_a_handful_of_volumes_where_an_exact_shuffle_holds_many():
    volume_of = dataset().slab_of
    streamed = [len({volume_of(place)[0] for place in batch}) for batch in islice(batches(), 4, 24)]
    exact = [len({volume_of(place)[0] for place in range(first, first + 16)}) for first in range(0, 320, 16)]
    assert np.mean(streamed) < 8 < 12 < np.mean(exact)


def test_without_a_buffer_a_volume_comes_whole_from_feet_to_head():
    first = next(iter(StreamBatches(batch_size=SLABS, dataset=dataset(), buffer_slabs=1, seed=0)))
    slabs = [dataset().slab_of(place) for place in first]
    assert len({volume for volume, _, _ in slabs}) == 1
    assert [start for _, start, _ in slabs] == list(range(SLABS))


def test_a_resumed_run_goes_on_where_an_unbroken_one_is_and_seeds_differ():
    unbroken = list(islice(batches(), 9))
    resumed = batches()
    resumed.start_step = 5
    assert list(islice(resumed, 4)) == unbroken[5:]
    assert list(islice(batches(seed=1), 9)) != unbroken
