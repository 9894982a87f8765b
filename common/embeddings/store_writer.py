"""Write embeddings of a cohort to a folder that an ``EmbeddingStore`` reads."""

# T tokens of a volume, P patches of a slice, D embedding

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from common.embeddings.part import (
    DTYPES,
    IDENTITY_KEYS,
    TOKEN_KINDS,
    Embedding,
    check_embedding,
    write_part,
)
from common.embeddings.store import EmbeddingStore, stored_volumes

PART_BYTES = 64 * 2**20
"""A part is written once it holds this much: about 100 volumes of 300 slices, 1024 wide in 16 bits."""

PART_SECONDS = 60.0
"""A part is written at the latest this long after its first volume. Our choice, too: what a kill costs."""


class EmbeddingStoreWriter:
    """Add embeddings to a folder, new or not; use it in a ``with`` statement, or close it.

    Volumes wait in memory for their part: it is written when it is full, a minute old, or at the end, so a
    kill costs no more than that and nothing written. Several processes may write into one folder, each with a
    writer of its own, as long as they write different volumes.

    Args:
        folder: of the store.
        identity: values for ``IDENTITY_KEYS``; must be what the folder has already, if it has any.
        dtype: "float16" or "float32", type of the stored tokens, patches and pooled embeddings.
        part_bytes: size at which a part is written.
        part_seconds: age at which a part is written, looked at with each volume.

    Raises:
        ValueError: if a key is missing, the dtype unknown, or the folder holds embeddings of another origin.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        dtype: str,
        part_bytes: int = PART_BYTES,
        part_seconds: float = PART_SECONDS,
    ) -> None:
        missing = [key for key in IDENTITY_KEYS if key not in identity]
        if missing:
            raise ValueError(f"identity must have the keys {IDENTITY_KEYS}, got none of {missing}.")
        if identity["token_kind"] not in TOKEN_KINDS:
            raise ValueError(f"token_kind must be one of {TOKEN_KINDS}, got '{identity['token_kind']}'.")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got '{dtype}'.")
        self.folder = Path(folder)
        self.identity = {key: identity[key] for key in IDENTITY_KEYS} | {"dtype": dtype}
        self.part_bytes, self.part_seconds = part_bytes, part_seconds
        self._fields: tuple[str, ...] | None = None
        self._waiting: list[Embedding] = []
        self._names: set[str] = set()
        self._bytes, self._since = 0, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        if stored_volumes(self.folder):
            store = EmbeddingStore(self.folder)
            for key, own in self.identity.items():
                self._agree(key, store.identity[key], own)
            self.identity["dim"], self._fields = store.identity["dim"], store.fields
            self._names = set(store.volumes)

    def add(
        self,
        volume: str,
        tokens: torch.Tensor,
        spacing_mm: Sequence[float],
        z_mm: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        pooled: torch.Tensor | None = None,
        **metadata: object,
    ) -> None:
        """Add one volume.

        Args:
            volume: name.
            tokens: on any device, of any floating type.
            spacing_mm: of the CT, (x, y, z).
            z_mm: position of each token along the table, feet to head; for slices.
            patches: patch tokens of each slice, row-major.
            pooled: the encoder's own summary of the volume.
            metadata: JSON values to keep with the volume, such as ``grid_shape`` (of a grid of tokens) and
                ``patch_grid`` (rows and columns of a slice's patches).

        Shape:
            ``tokens (T, D)``, ``z_mm (T,)``, ``patches (T, P, D)``, ``pooled (E,)``.

        Raises:
            ValueError: if the volume is there already, a tensor has another shape than that, NaN or Inf in
                the stored type, or width or fields differ from the store's.
        """
        dtype = DTYPES[self.identity["dtype"]]
        embedding = Embedding(
            _stored(tokens, dtype),
            None if z_mm is None else _stored(z_mm, torch.float32),
            {"volume": volume, "spacing_mm": [float(mm) for mm in spacing_mm], **metadata},
            None if patches is None else _stored(patches, dtype),
            None if pooled is None else _stored(pooled, dtype),
        )
        check_embedding(embedding)
        if volume in self._names:
            raise ValueError(f"a volume must be embedded once, got '{volume}' again for '{self.folder}'.")
        self._agree("dim", self.identity.setdefault("dim", tokens.shape[1]), tokens.shape[1])
        self._fields = embedding.fields if self._fields is None else self._fields
        self._agree("fields", self._fields, embedding.fields)
        self._names.add(volume)
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(embedding)
        kept = [tensor for tensor in embedding if isinstance(tensor, torch.Tensor)]
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept)
        if self._bytes >= self.part_bytes or time.monotonic() - self._since >= self.part_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the volumes that wait."""
        if self._waiting:
            write_part(self.folder, self._waiting, self.identity)
        self._waiting, self._bytes = [], 0

    def close(self) -> None:
        """Write what waits; afterwards every volume added is on the disk."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # a volume is added whole or not at all: what was added before an error is worth keeping
        self.close()

    def _agree(self, key: str, stored: object, own: object) -> None:
        if stored != own:
            raise ValueError(
                f"{key} must be {stored!r} as in '{self.folder}', got {own!r}. Write into another folder."
            )


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
