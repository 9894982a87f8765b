"""Embeddings of a cohort on disk: a folder of memory-mapped safetensors parts.

A part packs the volumes of about 64 MiB, so that 47,000 volumes are some hundred files; it appears only when
it is whole, and every field of a volume has a checksum. Nothing in it is executed. The format was chosen by
benchmarks/embedding_store.py.
"""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from safetensors import safe_open

from common.embeddings.part import (
    DTYPES,
    IDENTITY_KEYS,
    SUFFIX,
    TOKEN_KINDS,
    Embedding,
    PartHeader,
    check_embedding,
    check_finite,
    crc32,
    read_header,
    write_part,
)

# N volumes, T tokens of a volume, S some of its slices, P patches of a slice, D embedding


class _Place(NamedTuple):
    """Where a volume lies: its part, its record, and its first rows of the part's tensors."""

    part: Path
    record: dict[str, Any]
    row: int
    first_token: int
    first_patch: int


class EmbeddingStore:
    """Read the embeddings of a folder; every read is checked against what was written.

    Memory-mapped: a read touches the pages of its volume alone. Instances can be sent to other processes.

    Attributes:
        volumes: names, sorted.
        lengths: int64 ``(N,)``, tokens of each volume.
        identity: encoder, encoder_id, preprocessing, slice_order, token_kind ("slice" or "grid"), dim and
            dtype ("float16" or "float32"), the same for all volumes.
        fields: which of "z_mm", "patches" and "pooled" every volume has.

    Args:
        folder: where an :class:`EmbeddingStoreWriter` wrote.

    Raises:
        FileNotFoundError: if the folder holds no embeddings.
        ValueError: if a part is damaged, parts differ in identity or fields, or two hold the same volume.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        parts = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not parts:
            raise FileNotFoundError(
                f"embeddings must be in '{self.folder}', got no *{SUFFIX} there. "
                "Run the inference.json of an encoder bundle."
            )
        self._places: dict[str, _Place] = {}
        self._checked: set[tuple[str, str]] = set()
        first: PartHeader | None = None
        for part in parts:
            header = read_header(part)
            first = first or header
            _check_same(first, header)
            for place in _places(part, header):
                volume = place.record["metadata"]["volume"]
                if volume in self._places:
                    raise ValueError(
                        f"a volume must be embedded once, got '{self._places[volume].part.name}' and "
                        f"'{part.name}' for volume '{volume}' in '{self.folder}'. Delete one of them."
                    )
                self._places[volume] = place
        assert first is not None
        self.identity, self.fields = first.identity, first.fields
        self.volumes = sorted(self._places)
        self.lengths = np.array([self._place(volume).record["num_tokens"] for volume in self.volumes])

    def __len__(self) -> int:
        return len(self.volumes)

    def read(self, volume: str) -> Embedding:
        """Read a volume, without its patch tokens.

        Args:
            volume: name.

        Returns:
            The embedding; its tensors are copies.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if it is not what was written.
        """
        place = self._place(volume)
        names = ["tokens", *(name for name in self.fields if name != "patches")]
        tensors = {name: _rows(place, name).clone() for name in names}
        for name, tensor in tensors.items():
            _check_read(tensor, name, place, place.record["crc32"][name])
        return Embedding(
            tensors["tokens"],
            tensors.get("z_mm"),
            dict(place.record["metadata"]),
            pooled=tensors.get("pooled"),
        )

    def view(self, volume: str, name: str = "tokens") -> torch.Tensor:
        """Return a field of a volume where it lies in its file: only the pages that are used are in memory.

        It is checked as a whole when it is first asked for. Do not write to it: this process shares it.

        Args:
            volume: name.
            name: "tokens", or one of ``fields`` but the patches.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if it is not what was written.
        """
        place = self._place(volume)
        rows = _rows(place, name)
        if (volume, name) not in self._checked:
            _check_read(rows, name, place, place.record["crc32"][name])
            self._checked.add((volume, name))
        return rows

    def doubts(self) -> dict[str, list[str]]:
        """List what made volumes unlike chest CTs when they were embedded; sound volumes are left out."""
        all_doubts = {volume: self._place(volume).record["metadata"].get("doubts") for volume in self.volumes}
        return {volume: doubts for volume, doubts in all_doubts.items() if doubts}

    def checksums(self, volumes: Sequence[str]) -> list[int]:
        """Return the CRC32 of each volume's tokens, as it was written.

        Args:
            volumes: names.

        Raises:
            KeyError: if there is no such volume.
        """
        return [self._place(volume).record["crc32"]["tokens"] for volume in volumes]

    def read_patches(self, volume: str, slices: Sequence[int] | None = None) -> torch.Tensor:
        """Read patch tokens; only those asked for are read from the disk.

        Args:
            volume: name. ``read(volume).metadata["patch_grid"]`` has their (rows, columns).
            slices: which, from the feet; None for all.

        Shape:
            Output: ``(S, P, D)``, patches row-major.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if no patch tokens are stored, a slice does not exist, or one is not what was written.
        """
        if "patches" not in self.fields:
            raise ValueError(
                f"patches must have been stored, got only {('tokens', *self.fields)} in '{self.folder}'. "
                "Embed with --patch_tokens True into another folder."
            )
        place = self._place(volume)
        num_tokens, num_patches = place.record["num_tokens"], place.record["num_patches"]
        wanted = list(range(num_tokens)) if slices is None else [int(index) for index in slices]
        if any(not 0 <= index < num_tokens for index in wanted):
            raise ValueError(f"slices must lie in 0..{num_tokens - 1}, got {wanted} for volume '{volume}'.")
        stored, sums = _tensor(place.part, "patches"), _tensor(place.part, "patches_crc32")
        patches = torch.empty(len(wanted), num_patches, self.identity["dim"], dtype=stored.dtype)
        for rows, index in zip(patches, wanted, strict=True):
            first = place.first_patch + index * num_patches
            rows.copy_(stored[first : first + num_patches])
            _check_read(rows, "patches", place, int(sums[place.first_token + index]))
        return patches

    def _place(self, volume: str) -> _Place:
        if volume not in self._places:
            raise KeyError(f"volume must be one of '{self.folder}', got '{volume}', which is not embedded.")
        return self._places[volume]


def stored_volumes(folder: str | Path) -> set[str]:
    """Names of the volumes that a folder has embeddings of; none if there is no store yet.

    Args:
        folder: of a store.

    Raises:
        ValueError: as :class:`EmbeddingStore`.
    """
    return set(EmbeddingStore(folder).volumes) if any(Path(folder).glob(f"*{SUFFIX}")) else set()


def _places(part: Path, header: PartHeader) -> list[_Place]:
    """Where the volumes of a part lie."""
    places, token, patch = [], 0, 0
    for index, record in enumerate(header.records):
        places.append(_Place(part, record, index, token, patch))
        token += record["num_tokens"]
        patch += record["num_tokens"] * record["num_patches"]
    return places


def _check_same(first: PartHeader, other: PartHeader) -> None:
    for key in (*first.identity, "fields"):
        a, b = (header.fields if key == "fields" else header.identity[key] for header in (first, other))
        if a != b:
            names = [header.records[0]["metadata"]["volume"] for header in (first, other)]
            raise ValueError(
                f"{key} must be the same for all embeddings, got {a!r} for volume '{names[0]}' and "
                f"{b!r} for volume '{names[1]}'. Keep each encoder's in a folder of its own."
            )


def _rows(place: _Place, name: str) -> torch.Tensor:
    """Return a volume's part of a mapped tensor."""
    mapped = _tensor(place.part, name)
    if name == "pooled":
        return mapped[place.row]
    return mapped[place.first_token : place.first_token + place.record["num_tokens"]]


def _check_read(tensor: torch.Tensor, name: str, place: _Place, expected_crc32: int) -> None:
    volume = place.record["metadata"]["volume"]
    if crc32(tensor) != expected_crc32:
        raise ValueError(
            f"{name} must have the checksum they were written with, got another for volume '{volume}' in "
            f"'{place.part}'. Delete the file and embed its volumes again."
        )
    check_finite(tensor, name, volume)


def _tensor(part: Path, name: str) -> torch.Tensor:
    """Return a tensor of a part, memory-mapped."""
    state = part.stat()
    return _mapped(str(part), state.st_ino, state.st_mtime_ns)[name]


@lru_cache(maxsize=4096)
def _mapped(path: str, inode: int, modified_ns: int) -> dict[str, torch.Tensor]:
    """Map a file once a process; one replaced since has another identity."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


# T tokens of a volume, P patches of a slice, D embedding


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
