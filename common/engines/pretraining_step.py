"""What all pretraining engines share: where the data start, means over ranks, and the stop at a bad loss."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ignite.distributed as idist
import torch
from ignite.engine import Events

AMP_DTYPES = ("bfloat16", "float32")


class Step(NamedTuple):
    """A step whose loss has not been looked at: the device may still be computing it.

    Args:
        number: of the step, from 1.
        loss: mean over all ranks, on the device.
        slabs: the rank's slabs, by ``volume`` and, where known, ``position`` and ``first_slice``.
    """

    number: int
    loss: torch.Tensor
    slabs: dict[str, list[Any]]


class PretrainingEngine(Protocol):
    """What the functions of this module ask of an engine."""

    state: Any
    data_loader: Any
    output_dir: Path
    unchecked: list[Step]

    def add_event_handler(self, event_name: Any, handler: Any) -> Any:  # noqa: ANN401 (Ignite's own)
        """Ignite's."""


def check_amp_dtype(amp_dtype: str) -> None:
    """Refuse another precision than those that the engines know.

    Raises:
        ValueError: if ``amp_dtype`` is neither of the two.
    """
    if amp_dtype not in AMP_DTYPES:
        raise ValueError(f"amp_dtype must be 'bfloat16' or 'float32', got {amp_dtype!r}.")


def keep_to_the_step(engine: PretrainingEngine) -> None:
    """Start the data at the engine's step, and look at the last losses when the run ends.

    Ignite iterates over the data after the first EPOCH_STARTED, when a checkpoint has been loaded.
    """
    engine.add_event_handler(Events.EPOCH_STARTED, _start_data_at_this_step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, stop_if_not_finite)


def _start_data_at_this_step(engine: PretrainingEngine) -> None:
    engine.data_loader.batch_sampler.start_step = engine.state.iteration


def on_device(batch: dict[str, Any], names: Iterable[str], device: torch.device) -> dict[str, Any]:
    """Return a batch whose named tensors, if it has them, are on a device; nothing waits for the copies."""
    moved = {name: batch[name].to(device, non_blocking=True) for name in names if name in batch}
    return batch | moved


def autocast_as(amp_dtype: str, device: torch.device) -> torch.autocast:
    """Return the context of one forward pass.

    One a pass: the casts that a pass without graph keeps would cut the graph of the next.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=amp_dtype == "bfloat16")


def means_over_ranks(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the detached means of scalars over the ranks, in float32.

    Every term is a mean whose average over the ranks is the value of the global batch.
    """
    values = torch.stack([value.detach().float() for value in terms.values()])
    if idist.get_world_size() > 1:
        values = torch.as_tensor(idist.all_reduce(values)) / idist.get_world_size()
    return dict(zip(terms, values, strict=True))


def remember_step(engine: PretrainingEngine, loss: torch.Tensor, batch: dict[str, Any]) -> None:
    """Keep the loss of a step and where its slabs came from, for ``stop_if_not_finite``.

    Args:
        engine: at this step.
        loss: mean over all ranks, on the device.
        batch: as the loader gave it, on the CPU.
    """
    slabs: dict[str, list[Any]] = {"volume": list(batch["volume"])}
    slabs |= {name: batch[name].tolist() for name in ("position", "first_slice") if name in batch}
    engine.unchecked.append(Step(engine.state.iteration, loss, slabs))


def stop_if_not_finite(engine: PretrainingEngine) -> None:
    """Stop if the loss of a step since the last look was not finite; waits for the device.

    Every rank knows the mean over all ranks, so they all stop here.

    Raises:
        FloatingPointError: names the first such step and the file that lists the rank's slabs of that step.
    """
    steps, engine.unchecked = engine.unchecked, []
    losses = torch.stack([step.loss for step in steps]).tolist() if steps else []
    for (number, _, slabs), loss in zip(steps, losses, strict=True):
        if math.isfinite(loss):
            continue
        path = engine.output_dir / f"not_finite_step_{number:08d}_rank_{idist.get_rank()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": number, "loss": str(loss), **slabs}, indent=1))
        raise FloatingPointError(
            f"loss must be finite, got {loss} at step {number}; its slabs are listed in '{path}'. "
            "Lower lr, or set amp_dtype to float32, and run again: it goes on from the last checkpoint."
        )
