"""Write the trained encoder where the inference config looks for it."""

from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from common.networks.encoder import save_encoder


class SaveEncoder:
    """Save the encoder, without projector and heads, when training has completed all its steps.

    Args:
        encoder: timm VisionTransformer under training, sharded over the ranks or not.
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
        if getattr(engine.state, "stopped_early", False):
            return
        # every rank takes part: each may hold a shard of every tensor
        tensors = get_model_state_dict(
            self.encoder, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if idist.get_rank() == 0:
            weights = cast(dict[str, torch.Tensor], tensors)
            save_encoder(weights, self.path, self.identity | {"steps": engine.state.iteration})
