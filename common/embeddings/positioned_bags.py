"""Bags whose slices know where they lie along the table, for heads that look at the sequence."""

# S slices of a volume, D embedding

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.embeddings.bags import EmbeddingBags
from common.embeddings.store import EmbeddingStore


class PositionedBags(EmbeddingBags):
    """As :class:`EmbeddingBags`, with one column more: the slice's position in mm.

    The positions rise from feet to head and are 0 in the middle of the volume, for scans share no origin.
    They have the number type of the embeddings; in 16 bits they are exact to a quarter of a millimetre.

    A bag is ``(S, D + 1)``; ``identity["dim"]`` stays D.

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
        if not isinstance(self.store, EmbeddingStore) or "z_mm" not in self.store.fields:
            raise ValueError(
                "embeddings_dir must hold embeddings of slices with positions, got none in "
                f"'{embeddings_dir}'. Embed the volumes with an encoder bundle of slices."
            )
        self.positions = [_centred(self.store.view(volume, "z_mm")) for volume in self.volumes]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As of :class:`EmbeddingBags`, but the tokens are a copy with the positions beside them."""
        bag = super().__getitem__(index)
        positions = self.positions[index].to(bag["tokens"].dtype)[:, None]
        return bag | {"tokens": torch.cat([bag["tokens"], positions], dim=1)}


def _centred(z_mm: torch.Tensor) -> torch.Tensor:
    return z_mm.float() - (z_mm[0] + z_mm[-1]).float() / 2
