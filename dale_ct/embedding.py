"""CTs to embeddings in one call: in memory, or in a store on disk as an encoder's bundle writes it."""

# B images of a batch, D embedding

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dale_ct.encoders import SliceEncoder, bundle_folder, load_encoder, read_config

if TYPE_CHECKING:
    import torch

    from common.embeddings.store import Embedding

logger = logging.getLogger("dale_ct")


def embed(
    path: str | Path,
    encoder: str = "dale_ct_2s",
    *,
    weights: str | None = None,
    device: str | None = None,
    patch_tokens: bool = False,
    strategy: str | None = None,
    num_workers: int = 1,
) -> "Embedding | dict[str, Embedding]":
    """Embed chest CTs with an encoder of slices: one vector per slice, feet to head.

    The same numbers as the encoder's bundle gives; the network stays loaded for the next call.

    Args:
        path: a CT as NIfTI in HU, MetaImage, NRRD or npz, a DICOM series, or a folder or zip of these.
        encoder: name of an encoder, see :func:`dale_ct.encoders`, or a bundle's folder.
        weights: a file, ``hub:<owner>/<name>[@revision]`` or "random"; None for the bundle's own, else the
            authors' release.
        device: "cuda", "cpu"; None for a GPU where there is one.
        patch_tokens: whether to return the patch tokens of each slice, too.
        strategy: how slices become images, a name of Table VI; None for the bundle's.
        num_workers: threads that read further CTs meanwhile.

    Returns:
        The embedding, if there is one CT in ``path``: ``tokens (slices, D)``, ``z_mm`` (positions of the
        slices, feet to head), ``spacing_mm``, ``metadata``, ``patches (slices, P, D)`` or None. Of several
        CTs, a dictionary by name.

    Raises:
        FileNotFoundError: if there is no CT, or no weights can be had.
        ValueError: if the encoder is unknown, or a CT cannot be used: says which and why.
    """
    from common.embeddings.store import DTYPES
    from common.embeddings.work import ct_sources
    from common.handlers.embedding_writer import VolumeOutputs, embedding_of

    open_encoder = load_encoder(encoder, weights, device, strategy)
    sources, rejected = ct_sources(path)
    batches = _batches(open_encoder, sources, patch_tokens, num_workers)
    outputs = VolumeOutputs(DTYPES[open_encoder.config["embedding_dtype"]])
    found = {}
    for pieces, cls, patches in _encoded(open_encoder, batches, patch_tokens):
        found |= {output.task.volume: embedding_of(output) for output in outputs.add(pieces, cls, patches)}
    found |= {output.task.volume: embedding_of(output) for output in outputs.rest()}
    rejected = [*rejected, *batches.rejected]
    for volume, reason, detail in rejected:
        logger.warning("'%s' is left out, %s: %s", volume, reason, detail)
    if not found:
        volume, reason, detail = rejected[0]
        raise ValueError(f"No CT of '{path}' can be used: '{volume}', {reason}: {detail}")
    return next(iter(found.values())) if len(found) == 1 and not rejected else found
