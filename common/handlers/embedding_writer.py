"""Write the embeddings of each volume as soon as it is encoded."""

from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from common.data.embedding_store_writer import EmbeddingStoreWriter


class EmbeddingWriter:
    """Write CLS per slice, feet to head, with the slices' positions, into an embedding store.

    Args:
        output_dir: folder of the store.
        encoder: name of the encoder bundle.
        encoder_id: which weights: hash or path, see ``encoder_identity``.
        preprocessing: name of the preprocessing strategy, as in Table VI.
        dtype: "float16" or "float32", type the embeddings are stored in.
    """

    def __init__(
        self, output_dir: str | Path, encoder: str, encoder_id: str, preprocessing: str, dtype: str
    ) -> None:
        identity = {
            "encoder": encoder,
            "encoder_id": encoder_id,
            "preprocessing": preprocessing,
            "slice_order": "feet_to_head",
            "token_kind": "slice",
        }
        self.writer = EmbeddingStoreWriter(output_dir, identity, dtype)

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _write(self, engine: Engine) -> None:
        state: Any = engine.state
        item, cls = state.batch[0], state.output[0]["pred"]
        spacing_mm = [float(value) for value in item["spacing_mm"]]
        z_mm = torch.arange(len(cls), dtype=torch.float32) * spacing_mm[2]
        self.writer.add(item["volume"], torch.as_tensor(cls), spacing_mm, z_mm=z_mm)

    def _close(self, engine: Engine) -> None:
        self.writer.close()
