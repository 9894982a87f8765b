"""CTs to embeddings in one call: in memory, or in a store on disk as an encoder's bundle writes it."""

# B images of a batch, D embedding

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dale_ct.encoder import SliceEncoder, load_encoder

if TYPE_CHECKING:
    import torch

    from common.embeddings.ct_batches import SliceBatches
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
    batches = _batches(
        open_encoder, [one._replace(stores=(open_encoder.strategy.name,)) for one in sources], num_workers
    )
    outputs = VolumeOutputs(DTYPES[open_encoder.config["embedding_dtype"]])
    found: dict[str, Embedding] = {}
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


def embed_to_store(
    path: str | Path,
    output_dir: str | Path,
    encoder: str = "dale_ct_2s",
    *,
    weights: str | None = None,
    device: str | None = None,
    patch_tokens: bool = False,
    strategy: str | None = None,
    num_workers: int = 4,
    max_rejected: float = 0.01,
) -> None:
    """Embed the CTs of a folder that are not in the store yet; what a kill leaves is gone on with.

    Arguments and errors as of :func:`embed`.

    Args:
        path: CTs, as for :func:`embed`, or shards.
        output_dir: folder of the store, opened by ``dale_ct.EmbeddingStore``.
        encoder: name of an encoder of slices.
        weights: as for :func:`embed`.
        device: as for :func:`embed`.
        patch_tokens: whether to store patch tokens, too.
        strategy: as for :func:`embed`.
        num_workers: threads that read ahead.
        max_rejected: share of CTs that may fail.
    """
    from common.embeddings.work import ct_sources, embedding_work, store_folders
    from common.handlers.embedding_writer import EmbeddingWriter
    from common.run.process import claimed

    sources, rejected = ct_sources(path)
    open_encoder = load_encoder(encoder, weights, device, strategy)
    folders = store_folders(output_dir, [open_encoder.strategy.name])
    with claimed(output_dir):
        batches = _batches(open_encoder, embedding_work(sources, folders), num_workers)
        writer = EmbeddingWriter(
            folders=folders,
            output_dir=output_dir,
            identity=open_encoder.identity,
            dtype=open_encoder.config["embedding_dtype"],
            batches=batches,
            num_volumes=len(sources),
            rejected=rejected,
            max_rejected=max_rejected,
        )
        writer.start()
        try:
            for pieces, cls, patches in _encoded(open_encoder, batches, patch_tokens):
                writer.take(pieces, cls, patches)
        except BaseException:
            writer.close()
            raise
        writer.finish()


def _batches(encoder: SliceEncoder, sources: list[Any], num_workers: int) -> "SliceBatches":
    """Batches of images of the CTs."""
    from common.embeddings.ct_batches import SliceBatches

    return SliceBatches(
        work=sources,
        strategies=[encoder.strategy],
        window=encoder.given.window,
        slice_axes=encoder.given.slice_axes,
        slices_per_batch=encoder.config["slices_per_batch"],
        num_workers=num_workers,
        device=encoder.device,
        padded=False,
    )


def _encoded(
    encoder: SliceEncoder,
    batches: "SliceBatches",
    patch_tokens: bool,
) -> Iterator[tuple[Any, "torch.Tensor", "torch.Tensor | None"]]:
    """Encode batch after batch; in halves, from when one does not fit into the GPU."""
    import torch

    from common.networks.encoder import SlicesInferer

    infer = SlicesInferer(encoder.config["amp_dtype"], compiled=False, patch_tokens=patch_tokens)
    most: int | None = None
    for batch in batches:
        images = batch["image"]
        while True:
            try:
                with torch.inference_mode():
                    outputs = [infer(part, encoder.network) for part in images.split(most or len(images))]
                break
            except torch.cuda.OutOfMemoryError:
                most = (most or len(images)) // 2
                if most == 0:
                    raise
                torch.cuda.empty_cache()
                logger.warning("The GPU's memory is too small for a batch: going on with %d images.", most)
        cls = torch.cat([output[0] for output in outputs])
        patches = (
            torch.cat([output[1] for output in outputs if output[1] is not None]) if patch_tokens else None
        )
        yield batch["pieces"], cls, patches
