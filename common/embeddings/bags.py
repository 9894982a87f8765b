"""Embeddings of volumes with labels, as bags for a probe."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal import isal_zlib
from torch.utils.data import Dataset, Sampler

from common.cohort.cohort import read_labels
from common.ct.files import volume_name
from common.embeddings.store import (
    DTYPES,
    IDENTITY_KEYS,
    SUFFIX,
    EmbeddingStore,
    check_finite,
    crc32,
)

# N volumes, T tokens of a volume, D embedding


ARRAY_SUFFIX = ".npy"
UNKNOWN = "unknown"


class EmbeddingArrays:
    """Read ``<volume>.npy`` files of float16, float32 or float64 ``(T, D)``; nothing pickled is opened.

    Attributes:
        volumes: names, sorted.
        lengths: int64 ``(N,)``, tokens of each volume.
        identity: as of an ``EmbeddingStore``; arrays do not say what made them, so all but dim and dtype is
            "unknown", and the encoder what the caller names.

    Args:
        folder: of the files.
        encoder: name to give them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is damaged or pickled, or arrays differ in width or number type, are empty or
            not floating (T, D).
    """

    def __init__(self, folder: str | Path, encoder: str = UNKNOWN) -> None:
        self.folder = Path(folder)
        paths = sorted(self.folder.glob(f"*{ARRAY_SUFFIX}"))
        if not paths:
            raise FileNotFoundError(f"embeddings must be in '{self.folder}', got no <volume>.npy there.")
        arrays = {path.name.removesuffix(ARRAY_SUFFIX): _mapped(path) for path in paths}
        self.volumes = sorted(arrays)
        self._known = dict.fromkeys(self.volumes, False)  # and whether its values have been checked
        self.lengths = np.array([len(arrays[volume]) for volume in self.volumes])
        first = self.volumes[0]
        for volume, array in arrays.items():
            for what, value in (("dim", array.shape[1]), ("dtype", array.dtype)):
                own = arrays[first].shape[1] if what == "dim" else arrays[first].dtype
                if value != own:
                    raise ValueError(
                        f"{what} must be the same for all embeddings, got {own} for volume '{first}' and "
                        f"{value} for volume '{volume}'. Keep each encoder's in a folder of its own."
                    )
        self.identity = dict.fromkeys(IDENTITY_KEYS, UNKNOWN) | {
            "encoder": encoder,
            "dim": arrays[first].shape[1],
            "dtype": "float16" if arrays[first].dtype == np.float16 else "float32",
        }

    def view(self, volume: str) -> torch.Tensor:
        """Return the tokens of a volume where they lie in their file; see ``EmbeddingStore.view``.

        Args:
            volume: name.

        Shape:
            Output: ``(T, D)``; float64 is converted to float32, which is a copy.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if a value is NaN or Inf.
        """
        if volume not in self._known:
            raise KeyError(f"No array of volume '{volume}' in '{self.folder}'.")
        tokens = torch.from_numpy(_mapped(self.folder / f"{volume}{ARRAY_SUFFIX}"))
        tokens = tokens.to(DTYPES[self.identity["dtype"]])
        if not self._known[volume]:
            check_finite(tokens, "tokens", volume)
            self._known[volume] = True
        return tokens

    def checksums(self, volumes: Sequence[str]) -> list[int]:
        """Return the CRC32 of each volume's tokens, all of which are read.

        Args:
            volumes: names.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if a value is NaN or Inf.
        """
        return [crc32(self.view(volume)) for volume in volumes]


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"embedding must be a whole .npy array, got '{path}' ({error}).") from error
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8 or 0 in array.shape:
        raise ValueError(
            f"embedding must be a floating array (T, D) with at least one token, got {array.dtype} "
            f"{array.shape} for volume '{path.name.removesuffix(ARRAY_SUFFIX)}'."
        )
    return array


# N volumes, S tokens of one, D embedding, C classes


logger = logging.getLogger(__name__)


def open_embeddings(folder: str | Path, encoder: str | None = None) -> EmbeddingStore | EmbeddingArrays:
    """Open a folder of embeddings: a store of ours, or plain ``<volume>.npy`` arrays.

    Args:
        folder: of the embeddings.
        encoder: name that a store must state, and that plain arrays are given; None for any, and "unknown".

    Raises:
        FileNotFoundError: if the folder holds neither.
        ValueError: if it holds both, embeddings of another encoder, or as the two readers.
    """
    folder = Path(folder)
    has_store, has_arrays = any(folder.glob(f"*{SUFFIX}")), any(folder.glob("*.npy"))
    if has_store == has_arrays:
        found = "both" if has_store else "neither"
        error = ValueError if has_store else FileNotFoundError
        raise error(
            f"embeddings_dir must hold *{SUFFIX} of an encoder bundle, or <volume>.npy arrays (T, D), "
            f"got {found} in '{folder}'."
        )
    if has_arrays:
        return EmbeddingArrays(folder, encoder or UNKNOWN)
    store = EmbeddingStore(folder)
    if encoder is not None and store.identity["encoder"] != encoder:
        raise ValueError(
            f"encoder must be '{encoder}', got '{store.identity['encoder']}' in '{folder}'. "
            "Pass --embeddings_dir of that encoder, or --encoder."
        )
    return store


def labelled_volumes(embeddings_dir: str | Path, labels_csv: str | Path) -> list[str]:
    """List the volumes that have an embedding, in the order of the label table.

    Labelled volumes without an embedding are counted in a warning.

    Args:
        embeddings_dir: folder of embeddings, see :func:`open_embeddings`.
        labels_csv: label table, see :func:`common.cohort.cohort.read_labels`.

    Raises:
        FileNotFoundError: if there is no embedding in the folder, or no such table.
        ValueError: if a volume has an embedding and no labels.
    """
    embedded = set(open_embeddings(embeddings_dir).volumes)
    labels = read_labels(labels_csv, [])
    unlabelled = sorted(embedded - labels.keys())
    if unlabelled:
        raise ValueError(
            f"every embedding must have a row in '{labels_csv}', got none for {len(unlabelled)} volumes of "
            f"'{embeddings_dir}', first volume '{unlabelled[0]}'."
        )
    if len(embedded) < len(labels):
        missing = [volume for volume in labels if volume not in embedded]
        logger.warning(
            "%d of %d labelled volumes have no embedding in '%s' and are left out, first '%s'.",
            *(len(missing), len(labels), embeddings_dir, missing[0]),
        )
    return [volume for volume in labels if volume in embedded]


class EmbeddingBags(Dataset[dict[str, Any]]):
    """Embeddings and labels of a cohort: bags of tokens, read from mapped files when they are asked for.

    Cohorts may be larger than the memory; what the memory has room for, the system keeps there.

    Attributes:
        volumes: names, in the order of the bags.
        class_names: names of the labels' columns.
        lengths: int64 ``(N,)``, tokens of each bag.
        labels: float32 ``(N, C)`` of 0 and 1.
        identity: encoder, encoder_id, preprocessing, slice_order, token_kind, dim and dtype of all of them.

    Args:
        embeddings_dir: folder of embeddings, see :func:`open_embeddings`.
        labels_csv: label table, see :func:`common.cohort.cohort.read_labels`.
        class_names: classes to read, columns of the table.
        volumes: volumes to load, with or without ``.nii.gz``; None for all in the folder.
        encoder: name the embeddings must state; None for any.

    Raises:
        FileNotFoundError: if an embedding or the table does not exist.
        ValueError: if labels are missing or given twice, or embeddings differ in origin or width or are
            empty; when a bag is read for the first time, if it is not what was written or not finite.
    """

    def __init__(
        self,
        embeddings_dir: str | Path,
        labels_csv: str | Path,
        class_names: Sequence[str],
        volumes: Sequence[str] | None = None,
        encoder: str | None = None,
    ) -> None:
        labels = read_labels(labels_csv, class_names)
        self.store = store = open_embeddings(embeddings_dir, encoder)
        if volumes is None:
            volumes = labelled_volumes(embeddings_dir, labels_csv)
        self.volumes = [volume_name(volume) for volume in volumes]
        unlabelled = [volume for volume in self.volumes if volume not in labels]
        if unlabelled:
            raise ValueError(
                f"every volume must have a row in '{labels_csv}', got none for volume '{unlabelled[0]}'."
            )
        length_of = dict(zip(store.volumes, store.lengths.tolist(), strict=True))
        absent = [volume for volume in self.volumes if volume not in length_of]
        if absent:
            raise FileNotFoundError(
                f"embeddings_dir must hold an embedding of volume '{absent[0]}', got none in "
                f"'{embeddings_dir}' ({len(absent)} of {len(self.volumes)} are missing)."
            )
        self.class_names = list(class_names)
        self.labels = torch.from_numpy(
            np.array([labels[volume] for volume in self.volumes], np.float32).reshape(-1, len(class_names))
        )
        self.identity = store.identity
        self.lengths = torch.tensor([length_of[volume] for volume in self.volumes]).long()

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return int(self.identity["dim"]) * DTYPES[self.identity["dtype"]].itemsize

    def checksum(self) -> str:
        """Return eight hexadecimal digits that tell these volumes, labels and tokens from others."""
        sums = self.store.checksums(self.volumes)
        listed = json.dumps([self.volumes, self.class_names, self.labels.tolist(), sums])
        return f"{isal_zlib.crc32(listed.encode()):08x}"

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``index``, ``tokens (S, D)`` (a view of the file, not a copy) and ``labels (C,)``."""
        tokens = self.store.view(self.volumes[index])
        return {"index": index, "tokens": tokens, "labels": self.labels[index]}


# B bags of a batch, S slices of a bag, D embedding, C classes


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
