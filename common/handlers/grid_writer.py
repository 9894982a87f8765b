"""Write the tokens that a 3D encoder makes of each volume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from common.data.embedding_store_writer import EmbeddingStoreWriter


class GridWriter:
    """Write what ``common.inferers.volumes`` gives: a grid of tokens, row-major, and the pooled vector.

    Args:
        output_dir: folder of the store.
        encoder: name of the encoder bundle.
        encoder_id: which weights: hash or seed, see ``common.networks.encoder.encoder_id``.
        preprocessing: what was done to the volume, and which of the encoder's tokens these are.
        axcodes: where the grid's axes point, such as "RAS"; kept with each volume.
        dtype: "float16" or "float32", type the tokens are stored in.
    """

    def __init__(
        self,
        output_dir: str | Path,
        encoder: str,
        encoder_id: str,
        preprocessing: str,
        axcodes: str,
        dtype: str,
    ) -> None:
        identity = {
            "encoder": encoder,
            "encoder_id": encoder_id,
            "preprocessing": preprocessing,
            "slice_order": "none",
            "token_kind": "grid",
        }
        self.writer = EmbeddingStoreWriter(output_dir, identity, dtype)
        self.axcodes = axcodes

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _write(self, engine: Engine) -> None:
        state: Any = engine.state
        item, bag = state.batch[0], state.output[0]["pred"]
        spacing_mm: Sequence[float] = [float(value) for value in item["spacing_mm"]]
        self.writer.add(
            item["volume"],
            torch.as_tensor(bag["tokens"]),
            spacing_mm,
            pooled=torch.as_tensor(bag["pooled"]),
            grid_shape=[int(size) for size in bag["grid"]],
            axcodes=self.axcodes,
        )

    def _close(self, engine: Engine) -> None:
        self.writer.close()
