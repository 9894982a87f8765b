"""Bags whose slices know where they lie along the table, for heads that look at the sequence."""

# N volumes, T slices of all volumes, D embedding

from collections.abc import Sequence
from pathlib import Path

import torch

from common.embeddings.bags import EmbeddingBags, open_embeddings
from common.embeddings.store import EmbeddingStore


class PositionedBags(EmbeddingBags):
    """As :class:`EmbeddingBags`, with one column more: the slice's position in mm.

    The positions rise from feet to head and are 0 in the middle of the volume, for scans share no origin.
    They have the number type of the embeddings; in 16 bits they are exact to a quarter of a millimetre.

    Attributes:
        tokens: ``(T, D + 1)``; ``identity["dim"]`` stays D.

    Args:
        embeddings_dir: folder of a store with positions, thus of slices.
        labels_csv: label table, see :func:`common.cohort.labels_csv.read_labels`.
        class_names: classes to read, columns of the table.
        volumes: volumes to load, with or without ``.nii.gz``; None for all in the folder.
        encoder: name the embeddings must state; None for any.

    Raises:
        FileNotFoundError: as :class:`EmbeddingBags`.
        ValueError: as :class:`EmbeddingBags`, and if the embeddings hold no positions.
    """

    def __init__(
        self,
        embeddings_dir: str | Path,
        labels_csv: str | Path,
        class_names: Sequence[str],
        volumes: Sequence[str] | None = None,
        encoder: str | None = None,
    ) -> None:
        super().__init__(embeddings_dir, labels_csv, class_names, volumes, encoder)
        store = open_embeddings(embeddings_dir, encoder)
        if not isinstance(store, EmbeddingStore) or "z_mm" not in store.fields:
            raise ValueError(
                "embeddings_dir must hold embeddings of slices with positions, got none in "
                f"'{embeddings_dir}'. Embed the volumes with an encoder bundle of slices."
            )
        positions = [_centred(store.read(volume).z_mm) for volume in self.volumes]
        self.tokens = torch.cat([self.tokens, torch.cat(positions).to(self.tokens.dtype)[:, None]], dim=1)


def _centred(z_mm: torch.Tensor | None) -> torch.Tensor:
    assert z_mm is not None  # the store has the field
    return z_mm.float() - (z_mm[0] + z_mm[-1]).float() / 2
