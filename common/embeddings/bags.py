"""Embeddings of volumes with labels, as bags for a probe."""

# N volumes, S tokens of one, D embedding, C classes

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from isal import isal_zlib
from torch.utils.data import Dataset

from common.cohort.labels_csv import read_labels
from common.ct.names import volume_name
from common.embeddings.arrays import UNKNOWN, EmbeddingArrays
from common.embeddings.part import DTYPES, SUFFIX
from common.embeddings.store import EmbeddingStore

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
        labels_csv: label table, see :func:`common.cohort.labels_csv.read_labels`.

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


class EmbeddingBags(Dataset):
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
        labels_csv: label table, see :func:`common.cohort.labels_csv.read_labels`.
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
