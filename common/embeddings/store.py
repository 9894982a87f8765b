"""Embeddings of a cohort on disk: a folder of memory-mapped safetensors parts.

A part packs the volumes of about 64 MiB, so that 47,000 volumes are some hundred files; it appears only when
it is whole, and every field of a volume has a checksum. Nothing in it is executed. The format was chosen by
benchmarks/embedding_store.py.
"""

# N volumes, T tokens of a volume, S some of its slices, P patches of a slice, D embedding

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from common.embeddings.part import (
    SUFFIX,
    Embedding,
    PartHeader,
    check_finite,
    crc32,
    read_header,
)


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
