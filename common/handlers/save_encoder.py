"""Write the trained encoder where the inference config looks for it."""

from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import nn

from common.networks.encoder import save_encoder


class SaveEncoder:
    """Save the encoder, without projector and heads, when training has completed all its steps.

    Args:
        encoder: timm VisionTransformer under training.
        path: safetensors file, in plain timm keys.
        identity: facts that a loader checks, see :func:`common.networks.encoder.save_encoder`.
    """

    def __init__(self, encoder: nn.Module, path: str | Path, identity: dict[str, Any]) -> None:
        self.encoder = encoder
        self.path = path
        self.identity = identity

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        if idist.get_rank() == 0 and not getattr(engine.state, "stopped_early", False):
            save_encoder(self.encoder, self.path, self.identity | {"steps": engine.state.iteration})
