from itertools import islice
from typing import Any

import pytest
import torch

from common.embeddings.bag_batches import (
    BagReader,
    ShuffledBatches,
    chunks,
    collate_bags,
    fits,
)
from common.embeddings.bags import EmbeddingBags


def test_every_epoch_visits_every_bag_once_in_an_order_of_its_own() -> None:
    batches = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    epochs = [[batches.batch(epoch * 3 + place) for place in range(3)] for epoch in range(2)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 3], [4, 4, 3]]
    orders = [sum(epoch, []) for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(11))
    assert orders[0] != orders[1]


def test_batch_depends_on_seed_and_step_alone() -> None:
    batches = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    straight = list(islice(batches, 10))
    for step in (9, 0, 5, 2):
        assert batches.batch(step) == straight[step]
    resumed = ShuffledBatches(num_bags=11, batch_size=4, seed=3)
    resumed.start_step = 5
    assert list(islice(resumed, 5)) == straight[5:]
    assert list(islice(ShuffledBatches(num_bags=11, batch_size=4, seed=4), 10)) != straight


def test_batch_larger_than_the_cohort_is_the_cohort() -> None:
    assert sorted(ShuffledBatches(num_bags=3, batch_size=16, seed=0).batch(7)) == [0, 1, 2]


@pytest.mark.parametrize(("num_bags", "batch_size"), [(0, 4), (4, 0)])
def test_no_bag_or_no_batch_is_refused(num_bags: int, batch_size: int) -> None:
    message = f"num_bags and batch_size must be at least 1, got {num_bags} and {batch_size}"
    with pytest.raises(ValueError, match=message):
        ShuffledBatches(num_bags, batch_size, seed=0)


def test_collated_bags_keep_their_lengths_and_memory() -> None:
    samples = [
        {"index": index, "tokens": torch.randn(length, 3), "labels": torch.tensor([1.0, 0.0])}
        for index, length in ((4, 2), (1, 5))
    ]
    batch = collate_bags(samples)
    assert batch["index"].tolist() == [4, 1]
    assert [bag.data_ptr() for bag in batch["bags"]] == [sample["tokens"].data_ptr() for sample in samples]
    assert batch["labels"].tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_bags_are_read_where_they_lie_on_a_cpu(write_cohort: Any) -> None:
    bags = EmbeddingBags(*write_cohort("train", 5, dtype=torch.float16), ["Emphysema"])
    reader = BagReader(bags, torch.device("cpu"))
    assert reader.resident is None
    for index, bag in zip((3, 0), reader([3, 0]), strict=True):
        assert bag.dtype == torch.float16
        assert torch.equal(bag, bags[index]["tokens"])
        assert bag.data_ptr() == bags[index]["tokens"].data_ptr()


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [(10**9, [[0, 1, 2], [3, 4]]), (2 * 11 * 7 * 2, [[0, 1], [2, 3], [4]]), (1, [[0], [1], [2], [3], [4]])],
)
def test_a_chunk_has_few_bags_and_few_bytes(
    write_cohort: Any, monkeypatch: pytest.MonkeyPatch, at_once: int, expected: list[list[int]]
) -> None:
    given = write_cohort("train", 5, dtype=torch.float16)
    bags = EmbeddingBags(*given, ["Emphysema"])
    bags.lengths[:] = torch.tensor([3, 11, 5, 4, 9])  # of 7 numbers in 16 bits
    monkeypatch.setattr("common.embeddings.bag_batches.BAGS_PER_CHUNK", 3)
    monkeypatch.setattr("common.embeddings.bag_batches.CHUNK_BYTES", at_once)
    assert [list(places) for places in chunks(bags)] == expected
    assert chunks(EmbeddingBags(*given, ["Emphysema"], volumes=[])) == []


def test_a_gpu_keeps_what_leaves_a_fifth_of_its_memory_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    assert fits(800, torch.device("cuda"))
    assert not fits(801, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.8, 0.0])
def test_resident_and_streamed_bags_are_the_same(
    write_cohort: Any, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr("common.embeddings.bag_batches.RESIDENT_SHARE", share)
    bags = EmbeddingBags(*write_cohort("train", 5, dtype=torch.float16), ["Emphysema"])
    reader = BagReader(bags, torch.device("cuda"))
    assert (reader.resident is not None) == (share > 0)
    for index, bag in zip((3, 0), reader([3, 0]), strict=True):
        assert bag.is_cuda
        assert torch.equal(bag.cpu(), bags[index]["tokens"])
