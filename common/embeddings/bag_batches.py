"""Batches of bags of different lengths, in an order that depends on the step alone."""

# B bags of a batch, S slices of a bag, D embedding, C classes

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from common.embeddings.bags import EmbeddingBags

RESIDENT_SHARE = 0.8  # of the free memory of a GPU; our choice
BAGS_PER_CHUNK, CHUNK_BYTES = 64, 2**27  # scored at once, at most; bounds memory, changes no number


def collate_bags(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join samples of :class:`EmbeddingBags` without padding.

    Args:
        samples: items of the data set.

    Returns:
        ``index (B,)``, ``bags``: list of B tensors ``(S, D)``, ``labels (B, C)``.
    """
    return {
        "index": torch.tensor([sample["index"] for sample in samples]),
        "bags": [sample["tokens"] for sample in samples],
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


class BagReader:
    """Bags of a cohort on a device: all of them if a GPU has room, else those that are asked for.

    They stay in the number type of their files, 16 bits as a rule: 28 GB for the 47,000 volumes of CT-RATE at
    1,024 numbers a slice. On a CPU they are read where they lie in their mapped files.

    Attributes:
        resident: all bags if they lie on a GPU, else None.

    Args:
        bags: cohort.
        device: where the bags are wanted.
    """

    def __init__(self, bags: EmbeddingBags, device: torch.device) -> None:
        self.bags, self.device = bags, device
        self.resident: list[torch.Tensor] | None = None
        if device.type != "cpu" and fits(int(bags.lengths.sum()) * bags.row_bytes, device):
            self.resident = [bags[index]["tokens"].to(device) for index in range(len(bags))]

    def __call__(self, indices: Iterable[int]) -> list[torch.Tensor]:
        """Return the bags ``(S, D)`` of some volumes.

        Args:
            indices: places of the volumes in the cohort.
        """
        if self.resident is not None:
            return [self.resident[index] for index in indices]
        bags = [self.bags[index]["tokens"] for index in indices]
        if self.device.type == "cpu":
            return bags
        packed = torch.cat(bags).pin_memory().to(self.device, non_blocking=True)
        return list(packed.split([len(bag) for bag in bags]))


def chunks(bags: EmbeddingBags) -> list[range]:
    """Split a cohort into stretches that are small enough to be scored at once, padded and in 32 bits.

    Args:
        bags: cohort.

    Returns:
        Places of the bags of each stretch.
    """
    largest = int(bags.lengths.max()) * bags.row_bytes if len(bags) else 1
    size = max(1, min(BAGS_PER_CHUNK, CHUNK_BYTES // largest))
    return [range(first, min(first + size, len(bags))) for first in range(0, len(bags), size)]


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether a GPU has room for a tensor, and a fifth of what is free besides for the work.

    Args:
        num_bytes: size of the tensor.
        device: a GPU.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= RESIDENT_SHARE * free


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of shuffled epochs; batch number ``step`` is a function of the seed and the step alone.

    Epoch e visits the bags in the order ``np.random.default_rng([seed, e]).permutation(num_bags)``.
    Its last batch is short when the batch size does not divide the number of bags.

    Args:
        num_bags: bags of an epoch.
        batch_size: bags of a batch.
        seed: seed of the orders.

    Raises:
        ValueError: if there is no bag or the batch size is not positive.

    Example:
        >>> [len(ShuffledBatches(num_bags=5, batch_size=2, seed=0).batch(step)) for step in range(4)]
        [2, 2, 1, 2]
    """

    def __init__(self, num_bags: int, batch_size: int, seed: int) -> None:
        if num_bags < 1 or batch_size < 1:
            raise ValueError(f"num_bags and batch_size must be at least 1, got {num_bags} and {batch_size}.")
        self.num_bags = num_bags
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = 0

    def batch(self, step: int) -> list[int]:
        """Return the bags of a step, counted from 0."""
        epoch, place = divmod(step, -(-self.num_bags // self.batch_size))
        order = _order_of_epoch(self.seed, epoch, self.num_bags)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1


@lru_cache(maxsize=16)  # several seeds take turns
def _order_of_epoch(seed: int, epoch: int, num_bags: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_bags)
