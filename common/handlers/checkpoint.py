"""Checkpoints that let a killed run go on with the same command and end in the same weights."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from common.networks.encoder import save_encoder
from common.run.process import atomic_file, on_stop, raise_stopped

logger = logging.getLogger(__name__)

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
AGREE_EVERY = 10  # iterations between two looks, over all ranks, at whether one was asked to stop
STOPPING = b"\nStopping when this step is saved. Ctrl-C again stops at once.\n"


@dataclass(kw_only=True, eq=False)
class Checkpoint:
    """Save and restore everything a run's future depends on.

    Loads the newest checkpoint of ``folder`` when the run starts, saves every ``interval_steps`` iterations,
    at the end, and when the process gets Ctrl-C or SIGTERM (as a cluster sends before it takes the machine
    back), after which the run ends; ``engine.state`` then has the ``exit_status``. A second signal ends the
    run at once. The data and all random numbers are functions of the step (see ``common.engines``), so that
    the iteration number is all there is to remember of them.

    Files appear only when whole: written aside, synced, renamed. Rank 0 writes; every rank reads. A
    checkpoint holds the whole network under plain names, however it is spread over the ranks, so that a run
    may go on with another number of ranks or another sharding.

    Args:
        folder: folder of checkpoints, which are named like ``step_00002000.pt``.
        network: plain, wrapped by DistributedDataParallel, or sharded by ``fully_shard``.
        optimizer: optimizer over all parameters of the network.
        others: name to a further network, spread over the ranks as the first may be, or to a scheduler or
            anything else with ``state_dict`` and ``load_state_dict``, equal on all ranks.
        interval_steps: iterations between checkpoints.
        keep: number of newest checkpoints to keep.
        knobs: settings that the run's course depends on, JSON values; a checkpoint of other settings is
            refused.
        only_finite: whether NaN or Inf among the weights is an error. A grid may hold probes that diverged.

    Raises:
        ValueError: at the start of a run, if the newest checkpoint was made with other knobs.
        FloatingPointError: when a checkpoint is due, on every rank, if a weight is not finite and
            ``only_finite``, or if the last loss of pretraining was not.
    """

    folder: str | Path
    network: nn.Module
    optimizer: Optimizer
    others: dict[str, Any]
    interval_steps: int
    keep: int
    knobs: dict[str, Any]
    only_finite: bool = True

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        self.asked_to_stop = 0  # number of the signal
        self.saved_step = -1  # known to every rank, when the file of rank 0 may not be there yet
        engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.STARTED, lambda: on_stop(self._ask_to_stop))
        engine.add_event_handler(Events.STARTED, self._come_last)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_if_asked)
        engine.add_event_handler(Events.COMPLETED, self._save)
        engine.add_event_handler(Events.COMPLETED, lambda: on_stop(raise_stopped))

    def _load(self, engine: Engine) -> None:
        path = max(Path(self.folder).glob("step_*.pt"), default=None)
        if path is None:
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        then, now = state["knobs"], self.knobs
        changed = [
            f"{name} {then.get(name)!r}, now {now.get(name)!r}"
            for name in sorted(then.keys() | now.keys())
            if then.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"Checkpoint '{path}' was made with {'; '.join(changed)}. "
                f"Use another --output_dir, or the old values."
            )
        options = StateDictOptions(full_state_dict=True)
        trained = {"model_state_dict": state["network"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.network, self.optimizer, **trained, options=options)
        for name, item in self.others.items():
            if isinstance(item, nn.Module):
                set_model_state_dict(item, state[name], options=options)
            else:
                item.load_state_dict(state[name])
        engine.state.iteration = self.saved_step = state["iteration"]
        engine.state.epoch = state["iteration"] // engine.state.epoch_length
        logger.info("Resumed at step %d from '%s'.", state["iteration"], path)

    def _save(self, engine: Engine) -> None:
        if self.saved_step == engine.state.iteration:
            return
        path = Path(self.folder) / f"step_{engine.state.iteration:08d}.pt"
        if hasattr(engine, "stop_if_not_finite"):  # pretraining looks at its losses only now and then
            engine.stop_if_not_finite()
        # every rank takes part: each may hold a shard of every tensor
        network, optimizer = get_state_dict(self.network, self.optimizer, options=WHOLE)
        state: dict[str, Any] = {"network": network, "optimizer": optimizer}
        state["iteration"] = engine.state.iteration
        for name, item in self.others.items():
            is_network = isinstance(item, nn.Module)
            state[name] = get_model_state_dict(item, options=WHOLE) if is_network else item.state_dict()
        tensors = cast(dict[str, torch.Tensor], network).items()  # none but on rank 0, which tells the others
        bad = [name for name, weight in tensors if self.only_finite and not torch.isfinite(weight).all()]
        if idist.all_reduce(len(bad), op="MAX"):
            raise FloatingPointError(
                f"Weights contain NaN or Inf: {bad[:3]}. Checkpoint '{path}' not written."
            )
        self.saved_step = engine.state.iteration
        if idist.get_rank() != 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            torch.save(state | {"knobs": self.knobs}, file)
        old = sorted(path.parent.glob("step_*.pt"))[: -self.keep]
        for file_to_delete in (*old, *path.parent.glob("step_*.partial")):  # partial: left by a kill
            file_to_delete.unlink()

    def _come_last(self, engine: Engine) -> None:
        """Save when all other handlers are done with a step, so that a kill in between loses none of it."""
        if not engine.has_event_handler(self._save, Events.ITERATION_COMPLETED):
            engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval_steps), self._save)

    def _ask_to_stop(self, number: int) -> None:
        self.asked_to_stop = number
        on_stop(raise_stopped)
        if idist.get_rank() == 0:
            os.write(2, STOPPING)  # logging may be what was interrupted

    def _stop_if_asked(self, engine: Engine) -> None:
        asked = self.asked_to_stop
        if idist.get_world_size() > 1:
            # ranks may get the signal at different steps, and one that stops alone leaves the others waiting
            if engine.state.iteration % AGREE_EVERY:
                return
            asked = int(idist.all_reduce(asked, op="MAX"))
        if asked:
            engine.state.exit_status = 128 + asked  # type: ignore[attr-defined]
            engine.terminate()


class SaveEncoder:
    """Save the encoder, without projector and heads, when training has completed all its steps.

    Args:
        encoder: timm VisionTransformer under training, sharded over the ranks or not.
        path: safetensors file, in plain timm keys.
        identity: facts of :func:`common.networks.encoder.save_encoder`, to which the steps are added.
    """

    def __init__(self, encoder: nn.Module, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.encoder = encoder
        self.path = path
        self.identity = identity

    def attach(self, engine: Engine) -> None:
        """Register with an Ignite engine."""
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _save(self, engine: Engine) -> None:
        if getattr(engine.state, "exit_status", 0):
            return
        # every rank takes part: each may hold a shard of every tensor
        weights = cast(dict[str, torch.Tensor], get_model_state_dict(self.encoder, options=WHOLE))
        if idist.get_rank() == 0:
            save_encoder(weights, self.path, {**self.identity, "steps": engine.state.iteration})
