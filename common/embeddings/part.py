"""One file of an embedding store: the packed embeddings of some volumes, as safetensors."""

# N volumes of a part, T tokens of a volume, P patches of a slice, D embedding

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.run.process import atomic_file

IDENTITY_KEYS = ("encoder", "encoder_id", "preprocessing", "slice_order", "token_kind")
"""What all embeddings of a cohort have in common, beside width and number type."""

TOKEN_KINDS = ("slice", "grid")
"""A token is the CLS of a slice, feet to head, or a cell of a 3D encoder's grid."""

DTYPES = {"float16": torch.float16, "float32": torch.float32}
OPTIONAL_FIELDS = ("z_mm", "patches", "pooled")
FORMAT = "dale_ct_embeddings_2"
SUFFIX = ".embeddings.safetensors"


class Embedding(NamedTuple):
    """One volume.

    Args:
        tokens: ``(T, D)``: CLS per slice, feet to head, or a grid of tokens.
        z_mm: ``(T,)`` position of each slice along the table, feet to head; None for a grid.
        metadata: JSON values: ``volume``, ``spacing_mm`` (x, y, z) and whatever else was stored.
        patches: ``(T, P, D)`` patch tokens of each slice, row-major; None where none are stored or asked for.
        pooled: ``(E,)``, an encoder's own summary of the volume, which may lie in a space of another width;
            None where none is stored.
    """

    tokens: torch.Tensor
    z_mm: torch.Tensor | None
    metadata: dict[str, Any]
    patches: torch.Tensor | None = None
    pooled: torch.Tensor | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the optional fields it has."""
        return tuple(name for name in OPTIONAL_FIELDS if getattr(self, name) is not None)


class PartHeader(NamedTuple):
    """What a part says about itself.

    Args:
        identity: ``IDENTITY_KEYS``, ``dim`` and ``dtype`` ("float16" or "float32").
        fields: optional fields that every volume has.
        records: one a volume: its ``metadata``, ``num_tokens``, ``num_patches`` a token, and ``crc32`` of the
            bytes of each field but the patches.
    """

    identity: dict[str, Any]
    fields: tuple[str, ...]
    records: list[dict[str, Any]]


def write_part(folder: Path, embeddings: Sequence[Embedding], identity: Mapping[str, Any]) -> Path:
    """Write volumes into a file of their own, which appears only when it is whole.

    Its name is made of the volumes', so that no two processes write the same file with other content.

    Args:
        folder: of the store; must exist.
        embeddings: checked by :func:`check_embedding`, all with the same fields, width and number type.
        identity: ``IDENTITY_KEYS``; more is left out.

    Returns:
        The file.
    """
    first = embeddings[0]
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = {"tokens": torch.cat([embedding.tokens for embedding in embeddings])}
    for field in first.fields:
        parts = [getattr(embedding, field) for embedding in embeddings]
        tensors[field] = torch.stack(parts) if field == "pooled" else torch.cat([_rows(p) for p in parts])
    if first.patches is not None:
        # one checksum a slice: a reader of some slices reads no others
        all_patches = [embedding.patches for embedding in embeddings if embedding.patches is not None]
        sums = [crc32(of_slice) for patches in all_patches for of_slice in patches]
        tensors["patches_crc32"] = torch.tensor(sums)
    header = {
        "format": FORMAT,
        "identity": json.dumps(
            {key: identity[key] for key in IDENTITY_KEYS}
            | {"dim": first.tokens.shape[1], "dtype": names[first.tokens.dtype]}
        ),
        "fields": json.dumps(first.fields),
        "volumes": json.dumps([_record(embedding) for embedding in embeddings], allow_nan=False),
    }
    header["crc32"] = str(_header_crc32(header))
    listed = "\n".join(embedding.metadata["volume"] for embedding in embeddings)
    path = folder / f"{hashlib.sha256(listed.encode()).hexdigest()[:16]}{SUFFIX}"
    with atomic_file(path) as file:
        file.write(save(tensors, metadata=header))
    return path


def _header_crc32(header: Mapping[str, str]) -> int:
    return int(isal_zlib.crc32("".join(header[name] for name in ("identity", "fields", "volumes")).encode()))


def _record(embedding: Embedding) -> dict[str, Any]:
    checked = [name for name in ("tokens", *embedding.fields) if name != "patches"]
    return {
        "metadata": embedding.metadata,
        "num_tokens": len(embedding.tokens),
        "num_patches": 0 if embedding.patches is None else embedding.patches.shape[1],
        "crc32": {name: crc32(getattr(embedding, name)) for name in checked},
    }


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, 1) if tensor.ndim == 3 else tensor


def crc32(tensor: torch.Tensor) -> int:
    """Checksum of a tensor's bytes, at several GB/s."""
    return int(isal_zlib.crc32(tensor.contiguous().numpy().data.cast("B")))


def read_header(path: Path) -> PartHeader:
    """Read what a part holds, without its tensors.

    Args:
        path: file of :func:`write_part`.

    Raises:
        ValueError: if the file is damaged or no part of an embedding store.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stated = file.metadata() or {}
            rows = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118 (no dict)
        if stated.get("format") != FORMAT:
            raise ValueError(f"format {stated.get('format')!r}")
        if stated["crc32"] != str(_header_crc32(stated)):
            raise ValueError("its header has another checksum")
        header = PartHeader(
            json.loads(stated["identity"]), tuple(json.loads(stated["fields"])), json.loads(stated["volumes"])
        )
        expected = _expected_rows(header)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"embeddings must be whole files of an EmbeddingWriter, got '{path}' ({error}). "
            "Delete it and embed its volumes again."
        ) from error
    if rows != expected:
        raise ValueError(f"'{path}' must have the rows its volumes state, {expected}, got {rows}.")
    return header


def _expected_rows(header: PartHeader) -> dict[str, int]:
    counts = [(int(record["num_tokens"]), int(record["num_patches"])) for record in header.records]
    num_tokens = sum(tokens for tokens, _ in counts)
    rows = {
        "tokens": num_tokens,
        "z_mm": num_tokens,
        "patches": sum(tokens * patches for tokens, patches in counts),
        "pooled": len(counts),
        "patches_crc32": num_tokens,
    }
    names = ["tokens", *header.fields, *(["patches_crc32"] if "patches" in header.fields else [])]
    return {name: rows[name] for name in names}


def check_embedding(embedding: Embedding) -> None:
    """Refuse what a reader could not rely on.

    Args:
        embedding: one volume.

    Raises:
        ValueError: if its metadata lack the volume's name or a positive spacing, or a tensor has another
            shape or number type than :class:`Embedding` says, no rows, or NaN or Inf.
    """
    tokens, z_mm, metadata, patches, pooled = embedding
    volume, spacing_mm = metadata.get("volume"), metadata.get("spacing_mm")
    if not isinstance(volume, str) or not volume:
        raise ValueError(f"volume must be a name, got {volume!r} in the metadata of an embedding.")
    if not (
        isinstance(spacing_mm, list | tuple)
        and len(spacing_mm) == 3
        and all(math.isfinite(mm) and mm > 0 for mm in spacing_mm)
    ):
        raise ValueError(
            f"spacing_mm must be three positive numbers (x, y, z), got {spacing_mm} for volume '{volume}'."
        )
    if tokens.ndim != 2 or tokens.dtype not in DTYPES.values():
        raise ValueError(
            f"tokens must be float16 or float32 (T, D), got {tokens.dtype} {tuple(tokens.shape)} "
            f"for volume '{volume}'."
        )
    if len(tokens) == 0:
        raise ValueError(f"embedding must have at least one token, got 0 for volume '{volume}'.")
    if z_mm is not None and (z_mm.shape != (len(tokens),) or not bool((z_mm.diff() >= 0).all())):
        raise ValueError(
            f"z_mm must rise feet to head with shape ({len(tokens)},), got {tuple(z_mm.shape)} "
            f"for volume '{volume}'."
        )
    _check_further(embedding)
    for name in ("tokens", *embedding.fields):
        check_finite(getattr(embedding, name), name, volume)


def _check_further(embedding: Embedding) -> None:
    tokens, _, metadata, patches, pooled = embedding
    volume, (num_tokens, dim) = metadata["volume"], tokens.shape
    if patches is not None and (
        patches.ndim != 3
        or patches.shape[::2] != (num_tokens, dim)
        or patches.shape[1] == 0
        or patches.dtype != tokens.dtype
    ):
        raise ValueError(
            f"patches must be {tokens.dtype} ({num_tokens}, P, {dim}), got {patches.dtype} "
            f"{tuple(patches.shape)} for volume '{volume}'."
        )
    if pooled is not None and (pooled.ndim != 1 or len(pooled) == 0 or pooled.dtype != tokens.dtype):
        raise ValueError(
            f"pooled must be {tokens.dtype} (E,), got {pooled.dtype} {tuple(pooled.shape)} "
            f"for volume '{volume}'."
        )
    grid_shape = metadata.get("grid_shape")
    if grid_shape is not None and math.prod(grid_shape) != num_tokens:
        raise ValueError(
            f"grid_shape must have {num_tokens} cells as there are tokens, got {grid_shape} "
            f"for volume '{volume}'."
        )


def check_finite(tensor: torch.Tensor, name: str, volume: str) -> None:
    """Refuse NaN and Inf; one pass at the speed of memory, as least and greatest value show both.

    Args:
        tensor: at least one value.
        name: what it is.
        volume: whose.

    Raises:
        ValueError: if a value is NaN or Inf; the message counts the rows.
    """
    if torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        return
    bad = int((~torch.isfinite(tensor.reshape(len(tensor), -1))).any(1).sum())
    hint = " Store float32: float16 ends at 65504." if tensor.dtype == torch.float16 else ""
    raise ValueError(
        f"{name} must be finite, got NaN or Inf in {bad} of {len(tensor)} rows for volume '{volume}'.{hint}"
    )
