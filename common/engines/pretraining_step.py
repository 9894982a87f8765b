"""What all pretraining engines share: where the data start, means over ranks, and the stop at a bad loss."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ignite.distributed as idist
import torch
from ignite.engine import Events

AMP_DTYPES = ("bfloat16", "float32")


class LastStep(NamedTuple):
    """What is looked at one step later, when the device has it.

    Args:
        step: its number.
        loss: mean over all ranks.
        batch: this rank's.
    """

    step: int
    loss: torch.Tensor
    batch: dict[str, Any]


class PretrainingEngine(Protocol):
    """What the functions of this module ask of an engine."""

    state: Any
    data_loader: Any
    output_dir: Path
    last_step: LastStep | None

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
    """Start the data at the engine's step, and stop at the end of a run whose last loss is not finite.

    Ignite iterates over the data after the first EPOCH_STARTED, thus after a checkpoint was loaded.
    """
    engine.add_event_handler(Events.EPOCH_STARTED, _start_data_at_this_step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, stop_if_not_finite)


def _start_data_at_this_step(engine: PretrainingEngine) -> None:
    engine.data_loader.batch_sampler.start_step = engine.state.iteration


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device; nothing waits for the copies."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


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


def stop_if_not_finite(engine: PretrainingEngine) -> None:
    """Stop if the loss of the step before was not finite; every rank knows the mean and stops alike.

    Raises:
        FloatingPointError: if it was not; names the step and the file that lists the rank's batch.
    """
    last, engine.last_step = engine.last_step, None
    if last is None or torch.isfinite(last.loss):
        return
    path = engine.output_dir / f"not_finite_step_{last.step:08d}_rank_{idist.get_rank()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = {"volume": list(last.batch["volume"])}
    keys |= {name: last.batch[name].tolist() for name in ("position", "first_slice") if name in last.batch}
    path.write_text(json.dumps({"step": last.step, "loss": str(last.loss.item()), **keys}, indent=1))
    raise FloatingPointError(
        f"loss must be finite, got {last.loss.item()} at step {last.step}; its slabs are listed in '{path}'. "
        "Lower lr, or set amp_dtype to float32, and run again: it goes on from the last checkpoint."
    )
