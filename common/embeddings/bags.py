"""Embeddings of volumes with labels, as bags for a probe."""

# N volumes, B bags of a batch, S tokens of a bag (slices, or cells of a grid), D embedding, C classes

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

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
    check_identity,
    crc32,
)
from common.metrics.bootstrap import groups_of

logger = logging.getLogger(__name__)

ARRAY_SUFFIX = ".npy"
UNKNOWN = "unknown"

RESIDENT_SHARE = 0.8  # of the free memory of a GPU; our choice
BAGS_PER_CHUNK, CHUNK_BYTES = 64, 2**27  # scored at once, at most; bounds memory, changes no number


class EmbeddingArrays:
    """Reads ``<volume>.npy`` files of float16, float32 or float64 ``(S, D)`` like an ``EmbeddingStore``.

    Arrays do not say what made them: in ``identity`` all but dim and dtype is "unknown", unless the caller
    names the encoder. Pickled objects are never opened.

    Raises:
        ValueError: if a file is damaged or pickled, empty or not floating (S, D), or files differ in width or
            number type.
    """

    def __init__(self, folder: str | Path, encoder: str = UNKNOWN) -> None:
        self.folder = Path(folder)
        paths = self.folder.glob(f"*{ARRAY_SUFFIX}")
        arrays = {path.name.removesuffix(ARRAY_SUFFIX): _mapped(path) for path in paths}
        self.volumes = sorted(arrays)
        dim, dtype = arrays[self.volumes[0]].shape[1], arrays[self.volumes[0]].dtype
        for volume, array in arrays.items():
            if (array.shape[1], array.dtype) != (dim, dtype):
                raise ValueError(
                    f"'{self.folder}' holds {dtype} arrays of width {dim}, but '{volume}' is {array.dtype} "
                    f"of width {array.shape[1]}. Keep the arrays of each encoder in a separate folder."
                )
        self._checked: set[str] = set()
        self.lengths = np.array([len(arrays[volume]) for volume in self.volumes])
        self.identity = dict.fromkeys(IDENTITY_KEYS, UNKNOWN) | {
            "encoder": encoder,
            "dim": dim,
            "dtype": "float16" if dtype == np.float16 else "float32",
        }

    def view(self, volume: str) -> torch.Tensor:
        """Return the tokens ``(S, D)`` of a volume where they lie in their file; float64 becomes float32.

        Raises a KeyError if there is no such volume, and a ValueError if a value is NaN or Inf.
        """
        if volume not in self.volumes:
            raise KeyError(f"No array of volume '{volume}' in '{self.folder}'.")
        tokens = torch.from_numpy(_mapped(self.folder / f"{volume}{ARRAY_SUFFIX}"))
        tokens = tokens.to(DTYPES[self.identity["dtype"]])
        if volume not in self._checked:
            check_finite(tokens, "tokens", volume)
            self._checked.add(volume)
        return tokens

    def checksums(self, volumes: Sequence[str]) -> list[int]:
        """Return the CRC32 of each volume's tokens, all of which are read; raises as :meth:`view`."""
        return [crc32(self.view(volume)) for volume in volumes]


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"'{path}' is not a whole .npy array ({error}).") from error
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8 or 0 in array.shape:
        raise ValueError(
            f"embeddings must be floating arrays (S, D) with at least one token, got {array.dtype} "
            f"{array.shape} in '{path}'."
        )
    return array


def open_embeddings(folder: str | Path, encoder: str | None = None) -> EmbeddingStore | EmbeddingArrays:
    """Open a folder of embeddings: a store written by an encoder bundle, or plain ``<volume>.npy`` arrays.

    A store must state the name of the encoder, if one is given; arrays take it.

    Raises:
        FileNotFoundError: if the folder holds neither.
        ValueError: if it holds both, or embeddings of another encoder; and as the two readers.
    """
    folder = Path(folder)
    has_store, has_arrays = any(folder.glob(f"*{SUFFIX}")), any(folder.glob(f"*{ARRAY_SUFFIX}"))
    if not has_store and not has_arrays:
        raise FileNotFoundError(
            f"No embeddings in '{folder}': neither *{SUFFIX} of an encoder bundle nor <volume>.npy arrays."
        )
    if has_store and has_arrays:
        raise ValueError(f"'{folder}' holds both *{SUFFIX} and <volume>.npy arrays. Separate them.")
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

    A warning counts the labelled volumes without an embedding.

    Raises:
        FileNotFoundError: if there is no embedding in the folder, or no such table.
        ValueError: if a volume has an embedding and no labels.
    """
    embedded = set(open_embeddings(embeddings_dir).volumes)
    labels = read_labels(labels_csv, [])
    unlabelled = sorted(embedded - labels.keys())
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(embedded)} volumes in '{embeddings_dir}' have no row in "
            f"'{labels_csv}', the first is '{unlabelled[0]}'."
        )
    missing = [volume for volume in labels if volume not in embedded]
    if missing:
        logger.warning(
            "%d of %d labelled volumes have no embedding in '%s' and are left out, first '%s'.",
            *(len(missing), len(labels), embeddings_dir, missing[0]),
        )
    return [volume for volume in labels if volume in embedded]


class Bag(TypedDict):
    """One volume of a cohort."""

    index: int  # its place in the cohort
    tokens: torch.Tensor  # (S, D)
    labels: torch.Tensor  # (C,)


class BagBatch(TypedDict):
    """Some volumes of a cohort; their tokens are read by a :class:`BagReader`."""

    index: torch.Tensor  # (B,)
    labels: torch.Tensor  # (B, C)


class EmbeddingBags(Dataset[Bag]):
    """Embeddings and labels of a cohort: bags of tokens, read from mapped files when they are asked for.

    A cohort may be larger than memory; the operating system keeps in memory what it has room for.

    Attributes:
        lengths: int64 ``(N,)``, number of tokens per bag.
        labels: float32 ``(N, C)`` of 0 and 1.
        identity: ``IDENTITY_KEYS``, dim and dtype, the same for all bags.

    Args:
        embeddings_dir: folder of embeddings, see :func:`open_embeddings`.
        labels_csv: label table, see :func:`common.cohort.cohort.read_labels`.
        class_names: classes to read, columns of the table.
        volumes: volumes to load, with or without ``.nii.gz``; None for all in the folder.
        encoder: name that the embeddings must state; None for any.

    Raises:
        FileNotFoundError: if an embedding or the table does not exist.
        ValueError: if labels are missing or given twice, or embeddings differ in origin or width; when a bag
            is read for the first time, if it is not what was written or not finite.
    """

    def __init__(
        self,
        embeddings_dir: str | Path,
        labels_csv: str | Path,
        class_names: Sequence[str],
        *,
        volumes: Sequence[str] | None = None,
        encoder: str | None = None,
    ) -> None:
        labels = read_labels(labels_csv, class_names)
        self.store = open_embeddings(embeddings_dir, encoder)
        if volumes is None:
            volumes = labelled_volumes(embeddings_dir, labels_csv)
        self.volumes = [volume_name(volume) for volume in volumes]
        length_of = dict(zip(self.store.volumes, self.store.lengths.tolist(), strict=True))
        for volume in self.volumes:
            if volume not in labels:
                raise ValueError(f"No row of volume '{volume}' in '{labels_csv}'.")
            if volume not in length_of:
                raise FileNotFoundError(f"No embedding of volume '{volume}' in '{embeddings_dir}'.")
        self.class_names = list(class_names)
        rows = np.array([labels[volume] for volume in self.volumes], np.float32)
        self.labels = torch.from_numpy(rows.reshape(len(rows), len(class_names)))
        self.identity = self.store.identity
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

    def __getitem__(self, index: int) -> Bag:
        """Return a bag; its tokens are a view of the file, not a copy."""
        tokens = self.store.view(self.volumes[index])
        return {"index": index, "tokens": tokens, "labels": self.labels[index]}


def check_cohorts(cohorts: Mapping[str, EmbeddingBags], resampling: str) -> None:
    """Refuse cohorts that do not belong together; name classes that cannot be learned or measured.

    All are compared with ``train``; no two may share what ``resampling`` names, "patients" or "volumes".

    Raises:
        ValueError: if embeddings differ in origin or width, or two cohorts share a patient.
    """
    train = {name: value for name, value in cohorts["train"].identity.items() if name != "dtype"}
    remedy = "Embed all cohorts with one encoder."
    for cohort, bags in cohorts.items():
        check_identity(bags.identity, train, of=f"cohort '{cohort}'", source="in train", remedy=remedy)
        counts = zip(bags.class_names, bags.labels.sum(0).tolist(), strict=True)
        absent = [name for name, positives in counts if positives == 0]
        if absent:
            logger.warning("%s (%d volumes) has no positive of %s.", cohort, len(bags), absent)
    check_disjoint({name: groups_of(bags.volumes, resampling) for name, bags in cohorts.items()}, resampling)


def check_disjoint(groups: Mapping[str, Iterable[str]], what: str) -> None:
    """Raise a ValueError if a member of one cohort, such as a patient, is in another too."""
    cohort_of: dict[str, str] = {}
    for cohort, members in groups.items():
        for member in members:
            if cohort_of.setdefault(member, cohort) != cohort:
                raise ValueError(
                    f"cohorts must not share {what}, got '{member}' in {cohort_of[member]} and {cohort}."
                )


def collate_bags(samples: Sequence[Bag]) -> BagBatch:
    """Join the places and labels of bags; their tokens stay where they are."""
    index, labels = zip(*((sample["index"], sample["labels"]) for sample in samples), strict=True)
    return {"index": torch.tensor(index), "labels": torch.stack(labels)}


class BagReader:
    """Gives bags of a cohort on a device: all stay on a GPU if it has room, else each is read when needed.

    They keep the number type of their files, 16 bits as a rule: 28 GB for the 47,000 volumes of CT-RATE at
    1,024 numbers per slice. On a CPU they are read where they lie in their mapped files.

    Attributes:
        resident: all bags if they lie on a GPU, else None.
    """

    def __init__(self, bags: EmbeddingBags, device: torch.device) -> None:
        self.bags, self.device = bags, device
        self.resident: list[torch.Tensor] | None = None
        if device.type != "cpu" and fits(int(bags.lengths.sum()) * bags.row_bytes, device):
            self.resident = [bags[index]["tokens"].to(device) for index in range(len(bags))]

    def __call__(self, indices: Iterable[int]) -> list[torch.Tensor]:
        """Return the bags ``(S, D)`` at some places of the cohort."""
        if self.resident is not None:
            return [self.resident[index] for index in indices]
        bags = [self.bags[index]["tokens"] for index in indices]
        if self.device.type == "cpu":
            return bags
        packed = torch.cat(bags).pin_memory().to(self.device, non_blocking=True)
        return list(packed.split([len(bag) for bag in bags]))

    def chunks(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Yield places and bags, all in order, as many at once as can be scored padded and in 32 bits."""
        bags = self.bags
        largest = int(bags.lengths.max()) * bags.row_bytes if len(bags) else 1
        size = max(1, min(BAGS_PER_CHUNK, CHUNK_BYTES // largest))
        for first in range(0, len(bags), size):
            last = min(first + size, len(bags))
            yield slice(first, last), self(range(first, last))


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether a GPU has room for a tensor and still a fifth of what is free for the work."""
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= RESIDENT_SHARE * free


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of shuffled epochs; the batch of a step depends on the seed and the step alone.

    Epoch e visits the bags in the order ``np.random.default_rng([seed, e]).permutation(num_bags)``.
    Its last batch is short when the batch size does not divide the number of bags. Iteration starts at
    ``start_step``.

    Raises:
        ValueError: if there is no bag or the batch size is not positive.

    Example:
        >>> [len(ShuffledBatches(num_bags=5, batch_size=2, seed=0).batch(step)) for step in range(4)]
        [2, 2, 1, 2]
    """

    def __init__(self, num_bags: int, batch_size: int, seed: int) -> None:
        if num_bags < 1 or batch_size < 1:
            raise ValueError(f"num_bags and batch_size must be at least 1, got {num_bags} and {batch_size}.")
        self.num_bags, self.batch_size, self.seed = num_bags, batch_size, seed
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
