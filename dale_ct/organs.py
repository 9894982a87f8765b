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
from common.embeddings.organ_tokens import WITH_RADIOMICS, organ_radiomics, organ_tokens
from common.embeddings.store import Embedding, EmbeddingStore, EmbeddingStoreWriter, stored_volumes
from common.embeddings.work import CTSlices, ct_sources
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
    radiomics: bool = False,
    num_workers: int | None = None,
    **options: Any,  # noqa: ANN401 (load_encoder's)
) -> EmbeddingStore:
    """Embed CTs as tokens ``(O, D)`` of their organs; volumes that are in the store are passed over.

    No patch token is stored: those of one volume are in memory at a time. The store's preprocessing ends in
    ``_organs``, or ``_organs_radiomics``, and a volume's ``metadata["organs"]`` names its tokens; organs
    outside the scan have none.

    Args:
        path: a CT, or a folder of CTs; files, no DICOM series or shards.
        organs: TotalSegmentator's label map of the CT, or a folder of them, each named as its CT.
        output_dir: folder of the store.
        encoder: name of an encoder of slices, or its bundle's folder.
        radiomics: whether volume, mean HU and texture of each organ follow its token, see
            :func:`common.embeddings.organ_tokens.organ_radiomics`; each CT is then read twice.
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
    reads = {source.volume: source.read for source in sources}
    maps = _label_maps(Path(organs), [source.volume for source in sources])
    ending = WITH_RADIOMICS if radiomics else "_organs"
    name, dtype = opened.strategy.name + ending, opened.config["embedding_dtype"]
    identity = opened.identity | {"preprocessing": name, "token_kind": "organ"}
    workers = opened.config["num_workers"] if num_workers is None else num_workers
    with claimed(output_dir), EmbeddingStoreWriter(output_dir, identity, dtype) as writer:
        done = stored_volumes(output_dir)
        work = [source for source in sources if source.volume not in done]
        found = embeddings_of(opened, work, workers, patch_tokens=True, rejected=rejected)
        for volume, embedding in tqdm(found, total=len(work), unit="volume", desc="Pooling organs"):
            try:
                ids = pad_to_square(read_full_label_map(maps[volume], read_grid(cts[volume])), 0)
                names, tokens = _pooled(embedding, ids)
                if radiomics:
                    numbers = _measured(reads[volume](), ids, _box(embedding))
                    tokens = torch.cat([tokens, numbers], 1)
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
    shares = patch_shares(ids, _box(embedding), metadata["patch_grid"][0], TASKS["totalsegmentator"])
    return organ_tokens(patches, shares, metadata["slice_axes"])


def _box(embedding: Embedding) -> tuple[int, int, int]:
    """Return top, left and side of what the encoder saw of a square slice."""
    top, left, side = embedding.metadata.get("box") or (0, 0, embedding.metadata["side_px"])
    return top, left, side


def _measured(ct: CTSlices, ids: np.ndarray, box: tuple[int, int, int]) -> torch.Tensor:
    """Measure the organs within what the encoder saw, so that they are those of the tokens."""
    top, left, side = box
    hu, ids = (whole[:, top : top + side, left : left + side] for whole in (ct.hu, ids))
    return organ_radiomics(hu, ids, ct.spacing_mm)
