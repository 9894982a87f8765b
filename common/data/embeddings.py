"""Embeddings of volumes: their files, and bags of them with labels for a probe."""

# N volumes, T slices of all volumes, S slices of one, D embedding, C classes

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import Dataset

from common.data.atomic_file import atomic_file
from common.data.labels_csv import read_labels, volume_name

logger = logging.getLogger(__name__)

# what all embeddings of a cohort must have in common, beside width and number type
IDENTITY_KEYS = ("encoder", "encoder_id", "preprocessing", "slice_order")
METADATA_KEYS = ("volume", "spacing_mm", *IDENTITY_KEYS)
DTYPES = {"F16": torch.float16, "F32": torch.float32}


class Embedding(NamedTuple):
    """One volume: embeddings ``cls (S, D)``, ``z_mm (S,)`` along the table, and what the file states."""

    cls: torch.Tensor
    z_mm: torch.Tensor
    metadata: dict[str, str]


def write_embedding(
    path: str | Path, cls: torch.Tensor, z_mm: torch.Tensor, metadata: dict[str, str]
) -> None:
    """Write one volume's embeddings; the file appears only when it is whole.

    Args:
        path: ``<volume>.safetensors``.
        cls: one embedding a slice, feet to head, float16 or float32.
        z_mm: position of each slice along the table, feet to head.
        metadata: strings for all of ``METADATA_KEYS``; ``spacing_mm`` is JSON, (x, y, z).

    Shape:
        ``cls (S, D)``, ``z_mm (S,)``.

    Raises:
        ValueError: if a key of the metadata is missing, or the tensors are not what a reader may rely on.
    """
    path = Path(path)
    missing = [key for key in METADATA_KEYS if key not in metadata]
    if missing:
        raise ValueError(
            f"metadata must have the keys {METADATA_KEYS}, got none of {missing} for '{path.name}'."
        )
    _check(cls, z_mm, metadata["volume"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save({"cls": cls.contiguous(), "z_mm": z_mm.float().contiguous()}, metadata=metadata))


def read_embedding(path: str | Path) -> Embedding:
    """Read and check one volume's embeddings.

    Args:
        path: file of :func:`write_embedding`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, has no slice, or holds NaN or Inf.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"embedding must be a file, got '{path}', which does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            embedding = Embedding(file.get_tensor("cls"), file.get_tensor("z_mm"), file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"embedding must be a whole safetensors file, got '{path}' ({error}). Embed it again."
        ) from error
    missing = [key for key in METADATA_KEYS if key not in embedding.metadata]
    if missing:
        raise ValueError(f"metadata must have the keys {METADATA_KEYS}, got none of {missing} in '{path}'.")
    _check(embedding.cls, embedding.z_mm, embedding.metadata["volume"])
    return embedding


def _check(cls: torch.Tensor, z_mm: torch.Tensor, volume: str) -> None:
    if cls.ndim != 2 or cls.dtype not in DTYPES.values():
        raise ValueError(
            f"cls must be float16 or float32 (S, D), got {cls.dtype} {tuple(cls.shape)} for '{volume}'."
        )
    if len(cls) == 0:
        raise ValueError(f"embedding must have at least one slice, got 0 for volume '{volume}'.")
    if z_mm.shape != (len(cls),) or not bool((z_mm.diff() >= 0).all()):
        raise ValueError(
            f"z_mm must rise feet to head with shape ({len(cls)},), got {tuple(z_mm.shape)} for '{volume}'."
        )
    bad = int((~torch.isfinite(cls)).any(1).sum())
    if bad:
        raise ValueError(
            f"embedding must be finite, got NaN or Inf in {bad} of {len(cls)} slices for volume '{volume}'."
        )


def labelled_volumes(embeddings_dir: str | Path, labels_csv: str | Path) -> list[str]:
    """List the volumes that have an embedding, in the order of the label table.

    Labelled volumes without an embedding are counted in a warning.

    Args:
        embeddings_dir: folder of ``<volume>.safetensors``.
        labels_csv: label table, see :func:`common.data.labels_csv.read_labels`.

    Raises:
        FileNotFoundError: if there is no embedding in the folder, or no such table.
        ValueError: if a volume has an embedding and no labels.
    """
    folder = Path(embeddings_dir)
    embedded = {path.stem for path in folder.glob("*.safetensors")}
    if not embedded:
        raise FileNotFoundError(
            f"embeddings_dir must hold <volume>.safetensors files, got none in '{folder}'."
        )
    labels = read_labels(labels_csv, [])
    unlabelled = sorted(embedded - labels.keys())
    if unlabelled:
        raise ValueError(
            f"every embedding must have a row in '{labels_csv}', got none for {len(unlabelled)} volumes of "
            f"'{folder}', first volume '{unlabelled[0]}'."
        )
    if len(embedded) < len(labels):
        missing = [volume for volume in labels if volume not in embedded]
        logger.warning(
            "%d of %d labelled volumes have no embedding in '%s' and are left out, first '%s'.",
            *(len(missing), len(labels), folder, missing[0]),
        )
    return [volume for volume in labels if volume in embedded]


class EmbeddingBags(Dataset):
    """Embeddings and labels of a cohort in memory: bags of slices, packed without padding.

    Attributes:
        volumes: names, in the order of the bags.
        class_names: names of the labels' columns.
        tokens: all slices ``(T, D)`` in the number type of the files.
        offsets: first slice of each bag, and T at the end, ``(N + 1,)``.
        labels: float32 ``(N, C)`` of 0 and 1.
        identity: encoder, encoder_id, preprocessing, slice_order, dim and dtype, equal over all files.

    Args:
        embeddings_dir: folder of ``<volume>.safetensors``.
        labels_csv: label table, see :func:`common.data.labels_csv.read_labels`.
        class_names: classes to read, columns of the table.
        volumes: volumes to load, with or without ``.nii.gz``; None for all in the folder.
        encoder: name the files must state; None for any.

    Raises:
        FileNotFoundError: if an embedding or the table does not exist.
        ValueError: if labels are missing or given twice, or embeddings differ in origin or width, are empty
            or are not finite.
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
        if volumes is None:
            volumes = labelled_volumes(embeddings_dir, labels_csv)
        self.volumes = [volume_name(volume) for volume in volumes]
        unlabelled = [volume for volume in self.volumes if volume not in labels]
        if unlabelled:
            raise ValueError(
                f"every volume must have a row in '{labels_csv}', got none for volume '{unlabelled[0]}'."
            )
        self.class_names = list(class_names)
        self.labels = torch.from_numpy(np.stack([labels[volume] for volume in self.volumes]))
        paths = [Path(embeddings_dir) / f"{volume}.safetensors" for volume in self.volumes]
        # widths and lengths first: the packed slices are allocated once, not joined from copies
        headers = [_read_header(path) for path in paths]
        self.identity = _common_identity(headers, self.volumes, encoder)
        self.offsets = torch.tensor([0, *np.cumsum([header["num_slices"] for header in headers])])
        self.tokens = torch.empty(
            int(self.offsets[-1]), self.identity["dim"], dtype=DTYPES[self.identity["dtype"]]
        )
        for bag, path in enumerate(paths):
            self.tokens[self.offsets[bag] : self.offsets[bag + 1]] = read_embedding(path).cls

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``index``, ``tokens (S, D)`` (a view, not a copy) and ``labels (C,)`` of a volume."""
        tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        return {"index": index, "tokens": tokens, "labels": self.labels[index]}


def _read_header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"embeddings_dir must hold an embedding of volume '{path.stem}', got none at '{path}'."
        )
    try:
        with safe_open(path, framework="pt") as file:
            cls, metadata = file.get_slice("cls"), file.metadata() or {}
            num_slices, dim = cls.get_shape()
            identity = {key: metadata.get(key) for key in IDENTITY_KEYS}
            return identity | {"dim": dim, "dtype": cls.get_dtype(), "num_slices": num_slices}
    except SafetensorError as error:
        raise ValueError(
            f"embedding must be a whole safetensors file, got '{path}' ({error}). Embed it again."
        ) from error


def _common_identity(
    headers: list[dict[str, Any]], volumes: list[str], encoder: str | None
) -> dict[str, Any]:
    identity = {key: headers[0][key] for key in (*IDENTITY_KEYS, "dim", "dtype")}
    for header, volume in zip(headers, volumes, strict=True):
        for key, value in identity.items():
            if header[key] != value:
                raise ValueError(
                    f"{key} must be the same for all embeddings, got {value!r} for volume '{volumes[0]}' and "
                    f"{header[key]!r} for volume '{volume}'. Keep each encoder's in a folder of its own."
                )
    if encoder is not None and identity["encoder"] != encoder:
        raise ValueError(
            f"encoder must be '{encoder}', got '{identity['encoder']}' for volume '{volumes[0]}'. "
            f"Pass --embeddings_dir of that encoder, or --encoder."
        )
    return identity
