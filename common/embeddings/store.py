"""Embeddings of a cohort on disk: a folder of memory-mapped safetensors files, called parts.

A part packs volumes of about 64 MiB, so that 47,000 are some hundred files; it appears only when it is whole.
Each field of a volume has a checksum; nothing is executed. The format: benchmarks/embedding_store.py.
"""

# N volumes, T tokens of a volume, S some of its slices, P patches of a slice, D embedding

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.run.process import atomic_file

# what all embeddings of a cohort have in common, besides width and number type
IDENTITY_KEYS = ("encoder", "encoder_id", "preprocessing", "slice_order", "token_kind")
TOKEN_KINDS = ("slice", "grid", "organ")  # the CLS of a slice, a cell of a 3D grid, patches of an organ
DTYPES = {"float16": torch.float16, "float32": torch.float32}
SUFFIX = ".embeddings.safetensors"
FORMAT = "dale_ct_embeddings_2"
HEADER = ("identity", "fields", "volumes")
AGAIN = "Delete the file and embed its volumes again."
REMEDY = "Keep the embeddings of each encoder in a folder of their own."
PART_BYTES = 64 * 2**20  # a part has no more: some 100 volumes of 300 slices, 1024 wide, in 16 bits
PART_SECONDS = 60.0  # no volume waits longer for its part: what a kill may cost; our choice
Facts = Mapping[str, Any]


class Embedding(NamedTuple):
    """Embedding of one volume.

    Args:
        tokens: ``(T, D)``: CLS per slice, feet to head, or a grid of tokens, row-major.
        z_mm: ``(T,)`` position of each slice along the table; None for a grid.
        metadata: JSON values: ``volume``, ``spacing_mm`` (x, y, z) and whatever else was stored.
        patches: ``(T, P, D)`` patch tokens to be written, row-major; :meth:`EmbeddingStore.read` reads none.
    """

    tokens: torch.Tensor
    z_mm: torch.Tensor | None
    metadata: dict[str, Any]
    patches: torch.Tensor | None = None


def check_identity(found: Facts, expected: Facts, *, of: str, source: str, remedy: str) -> None:
    """Refuse embeddings or weights of another origin than those they are to be used with.

    Args:
        found: facts such as ``IDENTITY_KEYS`` and ``dim``; those that one side alone states do not count, nor
            does where weights were found: their digest is part of ``encoder_id``.
        expected: what they must be, or a ValueError is raised.
        of: what ``found`` describes, for the message.
        source: where ``expected`` comes from, as in "as <source>".
        remedy: sentence that says what to do.
    """
    for name, value in expected.items():
        if name != "weights" and name in found and found[name] != value:
            raise ValueError(f"{name} of {of} must be {value!r} as {source}, got {found[name]!r}. {remedy}")


class _Place(NamedTuple):
    """Where a volume lies: its part, the part's mapped tensors, its first rows there, and its record."""

    part: Path
    tensors: dict[str, torch.Tensor]
    token: int
    patch: int
    record: dict[str, Any]


class EmbeddingStore:
    """Read the embeddings of a folder; every read is checked against what was written.

    Memory-mapped: a read touches the pages of its volume alone. Instances can be sent to other processes.
    Methods raise a KeyError for a volume that is not there, and a ValueError for one that was changed.

    Attributes:
        volumes: names, sorted.
        lengths: int64 ``(N,)``, tokens of each volume.
        identity: ``IDENTITY_KEYS``, dim and dtype ("float16" or "float32"), the same for all volumes; and
            ``weights``, where those of the encoder were found, for stores that know it.
        fields: which of "z_mm" and "patches" every volume has.

    Args:
        folder: where an :class:`EmbeddingStoreWriter` wrote.

    Raises:
        FileNotFoundError: if the folder holds no embeddings.
        ValueError: if a part is damaged, parts differ in identity or fields, or two hold one volume.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        parts = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not parts:
            remedy = "Run the inference.json of an encoder bundle."
            raise FileNotFoundError(f"No embeddings in '{self.folder}' (*{SUFFIX}). {remedy}")
        self._places: dict[str, _Place] = {}
        self._checked: set[tuple[str, str]] = set()
        facts: dict[str, Any] = {}
        for part in parts:
            state = part.stat()
            of_part, places = _open_part(part, state.st_ino, state.st_mtime_ns)
            check_identity(of_part, facts, of=f"'{part}'", source="of the other files", remedy=REMEDY)
            facts = dict(of_part)
            for place in places:
                volume = place.record["metadata"]["volume"]
                if volume in self._places:
                    first = self._places[volume].part
                    raise ValueError(f"'{volume}' is in '{first}' and in '{part.name}'. Delete one of them.")
                self._places[volume] = place
        self.fields: tuple[str, ...] = facts.pop("fields")
        self.identity = facts
        self.volumes = sorted(self._places)
        self.lengths = np.array([self._places[volume].record["num_tokens"] for volume in self.volumes])

    def __reduce__(self) -> tuple[type["EmbeddingStore"], tuple[Path]]:
        return EmbeddingStore, (self.folder,)  # another process maps the files itself

    def __len__(self) -> int:
        return len(self.volumes)

    def read(self, volume: str) -> Embedding:
        """Read a volume, without its patch tokens; tensors are copies."""
        z_mm = self.view(volume, "z_mm").clone() if "z_mm" in self.fields else None
        return Embedding(self.view(volume).clone(), z_mm, dict(self._place(volume).record["metadata"]))

    def view(self, volume: str, name: str = "tokens") -> torch.Tensor:
        """Return a field of a volume where it lies in its file: only the pages that are used are in memory.

        It is checked as a whole when it is first asked for. Do not write to it: this process shares it.

        Args:
            volume: name of the volume.
            name: "tokens" or "z_mm".
        """
        place = self._place(volume)
        rows = place.tensors[name][place.token : place.token + place.record["num_tokens"]]
        if (volume, name) not in self._checked:
            _check_read(rows, name, place, place.record["crc32"][name])
            self._checked.add((volume, name))
        return rows

    def doubts(self) -> dict[str, list[str]]:
        """List what made volumes unlike chest CTs when they were embedded; sound volumes are left out."""
        doubts = {volume: self._places[volume].record["metadata"].get("doubts") for volume in self.volumes}
        return {volume: texts for volume, texts in doubts.items() if texts}

    def checksums(self, volumes: Sequence[str]) -> list[int]:
        """Return the CRC32 of the tokens of each of these volumes, as it was written."""
        return [self._place(volume).record["crc32"]["tokens"] for volume in volumes]

    def read_patches(self, volume: str, slices: Sequence[int] | None = None) -> torch.Tensor:
        """Read patch tokens; only those asked for are read from the disk.

        Args:
            volume: name of the volume. ``read(volume).metadata["patch_grid"]`` has their (rows, columns).
            slices: which, from the feet; None for all.

        Shape:
            Output: ``(S, P, D)``, patches row-major.

        Raises:
            ValueError: if no patch tokens are stored, a slice does not exist, or one was changed.
        """
        if "patches" not in self.fields:
            raise ValueError(
                f"No patch tokens in '{self.folder}'. Embed with --patch_tokens True into another folder."
            )
        place = self._place(volume)
        num_tokens, num_patches = place.record["num_tokens"], place.record["num_patches"]
        wanted = list(range(num_tokens)) if slices is None else [int(index) for index in slices]
        if any(not 0 <= index < num_tokens for index in wanted):
            raise ValueError(f"slices must lie in 0..{num_tokens - 1}, got {wanted} for volume '{volume}'.")
        stored = place.tensors["patches"][place.patch : place.patch + num_tokens * num_patches]
        patches = stored.unflatten(0, (num_tokens, num_patches))[wanted]
        for of_slice, index in zip(patches, wanted, strict=True):
            expected = int(place.tensors["patches_crc32"][place.token + index])
            _check_read(of_slice, "patches", place, expected)
        return patches

    def _place(self, volume: str) -> _Place:
        if volume not in self._places:
            raise KeyError(f"No embedding of '{volume}' in '{self.folder}'.")
        return self._places[volume]


def stored_volumes(folder: str | Path) -> set[str]:
    """Names of the volumes that a folder has embeddings of; none if there is no store yet."""
    return set(EmbeddingStore(folder).volumes) if any(Path(folder).glob(f"*{SUFFIX}")) else set()


class EmbeddingStoreWriter(AbstractContextManager["EmbeddingStoreWriter"]):
    """Add embeddings to a folder, new or not; use it in a ``with`` statement, or close it.

    Volumes wait in memory for their part: it is written when it is full, a minute old, or at the end, so that
    a kill costs no more than that and nothing written. Several processes may write into one folder, each with
    a writer of its own, as long as they write different volumes.

    Args:
        folder: folder of the store.
        identity: values for ``IDENTITY_KEYS``; must be what the folder has already, if it has any. With
            ``weights`` for where those of the encoder were found.
        dtype: "float16" or "float32", type of the stored tokens and patches.

    Raises:
        ValueError: if a key is missing, the dtype unknown, or the folder holds embeddings of another origin.
    """

    def __init__(self, folder: str | Path, identity: Facts, dtype: str) -> None:
        missing = [key for key in IDENTITY_KEYS if key not in identity]
        if missing:
            raise ValueError(f"identity must have the keys {IDENTITY_KEYS}, got none of {missing}.")
        kept = [name for name in (*IDENTITY_KEYS, "weights") if name in identity]
        self._facts: dict[str, Any] = {name: identity[name] for name in kept} | {"dtype": dtype}
        for name, known in (("token_kind", TOKEN_KINDS), ("dtype", tuple(DTYPES))):
            if self._facts[name] not in known:
                raise ValueError(f"{name} must be one of {known}, got '{self._facts[name]}'.")
        self.folder = Path(folder)
        self._waiting: list[Embedding] = []
        self._bytes, self._since = 0, 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._volumes: set[str] = set()
        if any(self.folder.glob(f"*{SUFFIX}")):
            store = EmbeddingStore(self.folder)
            self._agree(self._facts, store.identity | {"fields": store.fields})
            self._volumes = set(store.volumes)

    def add(
        self,
        volume: str,
        tokens: torch.Tensor,
        spacing_mm: Sequence[float],
        *,
        z_mm: torch.Tensor | None = None,
        patches: torch.Tensor | None = None,
        **metadata: object,
    ) -> None:
        """Add one volume.

        Args:
            volume: name of the volume.
            tokens: ``(T, D)``, on any device, of any floating type.
            spacing_mm: spacing of the CT, (x, y, z).
            z_mm: ``(T,)`` position of each token along the table, feet to head; for slices.
            patches: ``(T, P, D)`` patch tokens of each slice, row-major.
            metadata: JSON values to keep with the volume, such as ``grid_shape`` (of a grid of tokens) and
                ``patch_grid`` (rows and columns of a slice's patches).

        Raises:
            ValueError: if the volume is there already, a shape, the width or the fields differ from that, or
                a value is NaN or Inf in the stored type.
        """
        dtype = DTYPES[self._facts["dtype"]]
        embedding = Embedding(
            tokens.detach().to("cpu", dtype).contiguous(),
            None if z_mm is None else z_mm.detach().to("cpu", torch.float32).contiguous(),
            {"volume": volume, "spacing_mm": [float(mm) for mm in spacing_mm], **metadata},
            None if patches is None else patches.detach().to("cpu", dtype).contiguous(),
        )
        fields = tuple(name for name in ("z_mm", "patches") if getattr(embedding, name) is not None)
        check_embedding(embedding)
        if volume in self._volumes:
            raise ValueError(f"Volume '{volume}' is already in '{self.folder}'.")
        self._agree({"dim": tokens.shape[1], "fields": fields}, self._facts)
        self._volumes.add(volume)
        self._since = self._since if self._waiting else time.monotonic()
        self._waiting.append(embedding)
        self._bytes += sum(part.nbytes for part in embedding if isinstance(part, torch.Tensor))
        if self._bytes >= PART_BYTES or time.monotonic() - self._since >= PART_SECONDS:
            self.close()

    def close(self) -> None:
        """Write the volumes that wait, into a part: every volume added is on the disk afterwards."""
        if not (waiting := self._waiting):
            return
        whole = [name for name in ("tokens", *self._facts["fields"]) if name != "patches"]
        tensors = {name: torch.cat([getattr(one, name) for one in waiting]) for name in whole}
        all_patches = [one.patches for one in waiting if one.patches is not None]
        if all_patches:
            tensors["patches"] = torch.cat([patches.flatten(0, 1) for patches in all_patches])
            # one checksum per slice: a reader of some slices reads no others
            tensors["patches_crc32"] = torch.tensor(
                [crc32(one) for patches in all_patches for one in patches]
            )
        records = [
            {
                "metadata": one.metadata,
                "num_tokens": len(one.tokens),
                "num_patches": 0 if one.patches is None else one.patches.shape[1],
                "crc32": {name: crc32(getattr(one, name)) for name in whole},
            }
            for one in waiting
        ]
        stated = [name for name in (*IDENTITY_KEYS, "weights", "dim", "dtype") if name in self._facts]
        identity = {name: self._facts[name] for name in stated}
        header = {"identity": json.dumps(identity), "fields": json.dumps(self._facts["fields"])}
        header |= {"volumes": json.dumps(records, allow_nan=False), "format": FORMAT}
        header["crc32"] = _header_crc32(header)
        # named for its volumes, so that no two processes write the same file with other content
        listed = "\n".join(one.metadata["volume"] for one in waiting)
        with atomic_file(self.folder / f"{hashlib.sha256(listed.encode()).hexdigest()[:16]}{SUFFIX}") as file:
            file.write(save(tensors, metadata=header))
        self._waiting, self._bytes = [], 0

    def __exit__(self, *error: object) -> None:
        self.close()  # after an error, too: each volume was added whole

    def _agree(self, new: Facts, known: Facts) -> None:
        check_identity(new, known, of="new embeddings", source=f"in '{self.folder}'", remedy=REMEDY)
        self._facts = {**new, **known}


def check_embedding(embedding: Embedding) -> None:
    """Refuse what a reader could not rely on: shapes that disagree, NaN and Inf; raises ValueError."""
    tokens, z_mm, metadata, patches = embedding
    where, shape = f"for volume '{metadata['volume']}'", tuple(tokens.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"tokens must be (T, D) with T > 0, got {shape} {where}.")
    spacing_mm, grid_shape = metadata["spacing_mm"], metadata.get("grid_shape", shape[:1])
    if len(spacing_mm) != 3 or not all(0 < mm < math.inf for mm in spacing_mm):
        raise ValueError(f"spacing_mm must be three positive numbers (x, y, z), got {spacing_mm} {where}.")
    if math.prod(grid_shape) != shape[0]:
        raise ValueError(f"grid_shape must have {shape[0]} cells, one per token, got {grid_shape} {where}.")
    if z_mm is not None and (z_mm.shape != shape[:1] or not bool((z_mm.diff() >= 0).all())):
        raise ValueError(f"z_mm must rise in shape {shape[:1]}, got {tuple(z_mm.shape)} {where}.")
    if patches is not None and (patches.ndim != 3 or patches.shape[::2] != shape or 0 in patches.shape):
        raise ValueError(f"patches must be ({shape[0]}, P, {shape[1]}), got {tuple(patches.shape)} {where}.")
    for name, tensor in (("tokens", tokens), ("z_mm", z_mm), ("patches", patches)):
        if tensor is not None:
            check_finite(tensor, name, metadata["volume"])


def check_finite(tensor: torch.Tensor, name: str, volume: str) -> None:
    """Refuse NaN and Inf with a ValueError that counts the rows, names field and volume.

    One pass at the speed of memory, as the least and the greatest value show both.
    """
    if torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        return
    bad = int((~torch.isfinite(tensor.reshape(len(tensor), -1))).any(1).sum())
    hint = " Store float32: float16 ends at 65504." if tensor.dtype == torch.float16 else ""
    raise ValueError(
        f"{name} must be finite, got NaN or Inf in {bad} of {len(tensor)} rows for volume '{volume}'.{hint}"
    )


def crc32(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's bytes, at several GB/s."""
    return int(isal_zlib.crc32(tensor.contiguous().numpy().data.cast("B")))


def _header_crc32(header: Mapping[str, str]) -> str:
    return str(isal_zlib.crc32("".join(header[name] for name in HEADER).encode()))


@lru_cache(maxsize=4096)
def _open_part(part: Path, inode: int, modified_ns: int) -> tuple[dict[str, Any], list[_Place]]:
    """Map a part, once per process: its identity and fields, and where its volumes lie."""
    try:
        with safe_open(part, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}")
        if header["crc32"] != _header_crc32(header):
            raise ValueError("its header has another checksum")
        identity, fields, records = (json.loads(header[name]) for name in HEADER)
        places, token, patch = [], 0, 0
        for record in records:
            places.append(_Place(part, tensors, token, patch, record))
            token += record["num_tokens"]
            patch += record["num_tokens"] * record["num_patches"]
        # earlier versions also wrote a field "pooled", which nothing reads
        fields = tuple(name for name in fields if name != "pooled")
        sizes = {"tokens": token, "z_mm": token, "patches": patch}
        if any(len(tensors[name]) != sizes[name] for name in ("tokens", *fields)):
            raise ValueError(f"it must hold {sizes} rows, as its volumes state")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Cannot read embeddings '{part}': {error}. {AGAIN}") from error
    return identity | {"fields": fields}, places


def _check_read(tensor: torch.Tensor, name: str, place: _Place, expected_crc32: int) -> None:
    volume = place.record["metadata"]["volume"]
    if crc32(tensor) != expected_crc32:
        raise ValueError(f"The {name} of '{volume}' in '{place.part}' have another checksum now. {AGAIN}")
    check_finite(tensor, name, volume)
