"""Write the embeddings of each volume as soon as it is encoded."""

import json
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from common.data.embeddings import write_embedding


class EmbeddingWriter:
    """Write one embedding file a volume: CLS per slice, feet to head, with the slices' positions.

    Args:
        output_dir: folder of the ``<volume>.safetensors`` files.
        encoder: name of the encoder bundle.
        encoder_id: which weights: hash or path, see ``encoder_identity``.
        preprocessing: name of the preprocessing strategy, as in Table VI.
        dtype: "float16" or "float32", type the embeddings are stored in.
    """

    def __init__(
        self, output_dir: str | Path, encoder: str, encoder_id: str, preprocessing: str, dtype: str
    ) -> None:
        self.output_dir = Path(output_dir)
        self.encoder = encoder
        self.encoder_id = encoder_id
        self.preprocessing = preprocessing
        self.dtype = getattr(torch, dtype)

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        state: Any = engine.state
        item, cls = state.batch[0], state.output[0]["pred"]
        spacing_mm = [float(value) for value in item["spacing_mm"]]
        write_embedding(
            self.output_dir / f"{item['volume']}.safetensors",
            cls=torch.as_tensor(cls).to(self.dtype).cpu().contiguous(),
            z_mm=torch.arange(len(cls), dtype=torch.float32) * spacing_mm[2],
            metadata={
                "volume": item["volume"],
                "encoder": self.encoder,
                "encoder_id": self.encoder_id,
                "preprocessing": self.preprocessing,
                "spacing_mm": json.dumps(spacing_mm),
                "slice_order": "feet_to_head",
            },
        )
