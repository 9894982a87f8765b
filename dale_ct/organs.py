"""CTs to a bag of organ tokens each, as ``dale-ct embed --organs`` writes it."""

# S slices, P patches, D embedding, O organs

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.ct.files import find_cts, read_grid
from common.ct.rejection import RejectedError
from common.embeddings.dense_labels import TASKS
from common.embeddings.organ_tokens import organ_tokens
from common.embeddings.store import Embedding, EmbeddingStore, EmbeddingStoreWriter, stored_volumes
from common.embeddings.work import ct_sources
from common.run.process import claimed
from common.transforms.dense_labels import patch_shares
from common.transforms.slice_strategies import pad_to_square
from dale_ct.embedding import embeddings_of
from dale_ct.encoder import SliceEncoder, load_encoder
from data_prep.sources.totalsegmentator import read_full_label_map

logger = logging.getLogger("dale_ct")


def embed_organs(
    path: str | Path,
    organs: str | Path,
    output_dir: str | Path,
    encoder: str = "dale_ct_2s",
    *,
    num_workers: int | None = None,
    **options: Any,  # noqa: ANN401 (load_encoder's)
) -> EmbeddingStore:
    """Embed CTs as tokens ``(O, D)`` of their organs; volumes that are in the store are passed over.

    No patch token is stored: those of one volume are in memory at a time. The store's preprocessing ends in
    ``_organs``, and a volume's ``metadata["organs"]`` names its tokens; organs outside the scan have none.

    Args:
        path: a CT, or a folder of CTs; files, no DICOM series or shards.
        organs: TotalSegmentator's label map of the CT, or a folder of them, each named as its CT.
        output_dir: folder of the store.
        encoder: name of an encoder of slices, or its bundle's folder.
        num_workers: threads that read ahead; None for the bundle's.
        options: ``weights``, ``device``, ``strategy``, ``slice_axes`` and ``hu_window`` of
            :func:`dale_ct.encoder.load_encoder`.

    Raises:
        FileNotFoundError: if there is no CT, or no label map of one.
        ValueError: if the encoder is of volumes, or no CT can be used.
        BlockingIOError: if another process writes to the folder.
    """
    opened = load_encoder(encoder, **options, patch_tokens=True)
    if not isinstance(opened, SliceEncoder):
        raise ValueError(f"encoder must encode slices for --organs, got '{encoder}', of volumes.")
    sources, rejected = ct_sources(path)
    cts = {ct.volume: ct for ct in find_cts(Path(path))[0]}
    maps = _label_maps(Path(organs), [source.volume for source in sources])
    name, dtype = f"{opened.strategy.name}_organs", opened.config["embedding_dtype"]
    identity = opened.identity | {"preprocessing": name, "token_kind": "organ"}
    workers = opened.config["num_workers"] if num_workers is None else num_workers
    with claimed(output_dir), EmbeddingStoreWriter(output_dir, identity, dtype) as writer:
        done = stored_volumes(output_dir)
        work = [source for source in sources if source.volume not in done]
        found = embeddings_of(opened, work, workers, patch_tokens=True, rejected=rejected)
        for volume, embedding in tqdm(found, total=len(work), unit="volume", desc="Pooling organs"):
            try:
                names, tokens = _pooled(embedding, read_full_label_map(maps[volume], read_grid(cts[volume])))
            except RejectedError as error:
                rejected.append(error.of(volume))
                continue
            facts = {key: value for key, value in embedding.metadata.items() if key in KEPT}
            writer.add(volume, tokens, embedding.metadata["spacing_mm"], organs=names, **facts)
    for volume, reason, detail in rejected:
        logger.warning("'%s' is left out, %s: %s", volume, reason, detail)
    if not stored_volumes(output_dir):
        raise ValueError(f"No CT of '{path}' can be used: {rejected[0].detail}")
    return EmbeddingStore(output_dir)


def _label_maps(organs: Path, volumes: list[str]) -> dict[str, Path]:
    """Find the label map of each volume."""
    if organs.is_file() and len(volumes) == 1:
        return {volumes[0]: organs}
    maps = {ct.volume: ct.path for ct in find_cts(organs)[0]}
    for volume in volumes:
        if volume not in maps:
            raise FileNotFoundError(f"No label map of '{volume}' in '{organs}' (--organs).")
    return maps


KEPT = ("sha256", "doubts", "slice_axes", "side_px", "box")


def _pooled(embedding: Embedding, ids: np.ndarray) -> tuple[list[str], torch.Tensor]:
    """Pool the patches of a volume within the organs of its label map."""
    metadata, patches = embedding.metadata, embedding.patches
    assert patches is not None
    box = tuple(metadata.get("box") or (0, 0, metadata["side_px"]))
    shares = patch_shares(pad_to_square(ids, 0), box, metadata["patch_grid"][0], TASKS["totalsegmentator"])
    return organ_tokens(patches, shares, metadata["slice_axes"])
