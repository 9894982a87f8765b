"""What all pretraining engines share: one optimizer step, means over ranks, and the stop at a bad loss."""

import ctypes
import json
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer

from common.networks.pretraining_model import clip_by_global_norm, encoder_gradient_norm
from common.transforms.hounsfield import HUWindow
from common.transforms.view_batch import Batch

AMP_DTYPES = ("bfloat16", "float32")

Terms = dict[str, torch.Tensor]


class Step(NamedTuple):
    """A step whose loss has not been looked at: the device may still be computing it.

    Args:
        number: number of the step, from 1.
        loss: mean over all ranks, on the device.
        slabs: the rank's slabs, by ``volume`` and, where known, ``position`` and ``first_slice``.
    """

    number: int
    loss: torch.Tensor
    slabs: dict[str, list[Any]]


class PretrainingTrainer(SupervisedTrainer):
    """Train on views of slabs, one optimizer step per iteration.

    Every random number of an iteration is a function of the run's seed and the step. A resumed run therefore
    equals an unbroken one, and a run on several ranks the run on one with the same global batch.

    ``engine.state.output`` is MONAI's decollated ``[{"loss": ..., <term>: ..., "grad_norm": ...}]``, detached
    means over all ranks; ``engine.state.cls`` the CLS tokens of the global views ``(B, Vg, D)``, detached.
    Nothing waits for the device except every ``log_every`` steps, when the losses since are looked at.

    The loss is a weighted sum of terms, ``term_weights``. In the first and every ``grad_norms_every``-th step
    ``grad_norm_<term>`` tells how hard each pulls at the encoder, its weight included: the norm of the global
    batch's gradient, of one more pass per term in which all other weights are 0. Training stays the same.

    Args:
        device: device of network and batch.
        max_epochs: number of epochs, 1 in our recipes: MONAI asks for it.
        max_steps: optimizer steps of an epoch.
        train_data_loader: endless batches of ``SlabViews``.
        network: network to train, wrapped for distribution or not.
        optimizer: optimizer over all its parameters.
        loss_function: loss on what the network returns.
        hu_window: clip window and z-score of the input.
        clip_norm: largest global norm of the gradient.
        amp_dtype: "bfloat16" for autocast, "float32" for none; losses are in float32 either way.
        log_every: steps between two measurements, and two looks at whether the losses are finite.
        grad_norms_every: steps between two measurements of each term's gradient, a multiple of ``log_every``;
            0 for none.
        output_dir: folder for the list of slabs of a step whose loss is not finite.
        inferer: how views go through the network.
        train_handlers: Ignite handlers.

    Raises:
        ValueError: if ``amp_dtype`` is neither of the two, or ``grad_norms_every`` no multiple.
        FloatingPointError: in training, on every rank and before anything is saved, if the loss of a step is
            not finite; names the step and the file that lists the rank's slabs.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        max_epochs: int,
        max_steps: int,
        train_data_loader: Iterable[Batch],
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: nn.Module,
        hu_window: HUWindow,
        clip_norm: float,
        amp_dtype: str,
        log_every: int,
        grad_norms_every: int,
        output_dir: str | Path,
        inferer: Inferer | None = None,
        train_handlers: Sequence[Any] = (),
    ) -> None:
        if amp_dtype not in AMP_DTYPES:
            raise ValueError(f"amp_dtype must be 'bfloat16' or 'float32', got {amp_dtype!r}.")
        if grad_norms_every < 0 or grad_norms_every % log_every:
            rule = f"grad_norms_every must be 0 or a multiple of log_every {log_every}"
            raise ValueError(f"{rule}, got {grad_norms_every}.")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function.to(device),
            epoch_length=max_steps,
            inferer=inferer,
            decollate=False,
        )
        if device.type == "cpu":
            _keep_freed_memory()
        self.hu_window = hu_window
        self.clip_norm = clip_norm
        self.amp_dtype = amp_dtype
        self.log_every = log_every
        self.grad_norms_every = grad_norms_every
        self.loss_modules = [loss_function]
        self.term_weights: dict[str, float] = {}
        self.output_dir = Path(output_dir)
        self.unchecked: list[Step] = []
        # Ignite iterates over the data after the first EPOCH_STARTED, when a checkpoint has been loaded
        self.add_event_handler(Events.EPOCH_STARTED, _start_data_at_this_step)
        self.add_event_handler(Events.EPOCH_COMPLETED, self.stop_if_not_finite)
        self._register_handlers(list(train_handlers))

    @abstractmethod
    def compute(self, batch: Batch) -> tuple[Terms, dict[str, Any]]:
        """Compute the losses of a batch and the gradient of the first.

        Returns:
            The terms, ``loss`` first, and what the network returned, of which ``cls`` is kept.
        """

    @abstractmethod
    def after_step(self) -> None:
        """Do what follows the optimizer's step."""

    @abstractmethod
    def measure(self, output: dict[str, Any]) -> dict[str, float]:
        """Measure what the network returned, for ``engine.state.metrics``."""

    def _iteration(self, engine: Engine, batchdata: Batch) -> list[Terms]:  # type: ignore[override]
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        step, every = engine.state.iteration, self.grad_norms_every
        norms = self.gradient_norms(batchdata) if every and (step == 1 or step % every == 0) else {}
        terms, output = self.compute(batchdata)
        terms["grad_norm"] = clip_by_global_norm(self.network, self.clip_norm)
        self.optimizer.step()
        self.after_step()
        means = means_over_ranks(terms)
        self.remember_step(means["loss"], batchdata)
        self.state.cls = output["cls"].detach()
        if step % self.log_every == 0:
            self.stop_if_not_finite()
            self.state.metrics |= self.measure(output)
        return [means | norms]

    def weighted(self, terms: Terms) -> torch.Tensor:
        """Return the weighted sum of those terms that are part of the loss; 0 if there is none."""
        parts = (weight * terms[name] for name, weight in self.term_weights.items() if name in terms)
        return cast(torch.Tensor, sum(parts))

    def gradient_norms(self, batch: Batch) -> Terms:
        """Measure how hard each term of the loss pulls at the encoder; see the class."""
        weights, norms = self.term_weights, {}
        for loss in self.loss_modules:  # the centres of the teacher's logits stay where they are
            loss.eval()
        for term in weights:
            self.term_weights = {name: weight * (name == term) for name, weight in weights.items()}
            self.compute(batch)
            norms[f"grad_norm_{term}"] = encoder_gradient_norm(self.network)
            self.optimizer.zero_grad(set_to_none=True)
        for loss in self.loss_modules:
            loss.train()
        self.term_weights = weights
        return norms

    def autocast(self) -> torch.autocast:
        """Return the context of one forward pass.

        One per pass: the casts that a pass without graph keeps would cut the graph of the next.
        """
        enabled = self.amp_dtype == "bfloat16"
        return torch.autocast(self.state.device.type, torch.bfloat16, enabled=enabled)

    def remember_step(self, loss: torch.Tensor, batch: Batch) -> None:
        """Keep the loss of a step and where its slabs came from, for ``stop_if_not_finite``."""
        places = {"position": batch.get("position"), "first_slice": batch.get("first_slice")}
        slabs = {name: place.tolist() for name, place in places.items() if place is not None}
        self.unchecked.append(Step(self.state.iteration, loss, {"volume": list(batch["volume"]), **slabs}))

    def stop_if_not_finite(self) -> None:
        """Stop if the loss of a step since the last look was not finite; waits for the device.

        Every rank knows the mean over all ranks, so they all stop here.

        Raises:
            FloatingPointError: names the first such step and the file that lists the rank's slabs.
        """
        steps, self.unchecked = self.unchecked, []
        losses = torch.stack([step.loss for step in steps]).tolist() if steps else []
        for (number, _, slabs), loss in zip(steps, losses, strict=True):
            if math.isfinite(loss):
                continue
            path = self.output_dir / f"not_finite_step_{number:08d}_rank_{idist.get_rank()}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": number, "loss": str(loss), **slabs}, indent=1))
            raise FloatingPointError(
                f"The loss is {loss} at step {number}; its slabs are listed in '{path}'. "
                "Lower lr, or set amp_dtype to float32, and run again: it goes on from the last checkpoint."
            )


def _keep_freed_memory() -> None:
    """Have the C library keep what one step frees for the next: the kernel clears pages before it lends them.

    Up to 32 MiB apiece, the most that glibc allows; other C libraries are left as they are.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # names of its malloc.h
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(mmap_threshold, 2**25)


def _start_data_at_this_step(engine: Engine) -> None:
    engine.data_loader.batch_sampler.start_step = engine.state.iteration  # type: ignore[attr-defined]


def means_over_ranks(terms: Terms) -> Terms:
    """Return the detached means of scalars over the ranks, in float32.

    Every term is a mean whose average over the ranks is the value of the global batch.
    """
    values = torch.stack([value.detach().float() for value in terms.values()])
    if idist.get_world_size() > 1:
        values = torch.as_tensor(idist.all_reduce(values)) / idist.get_world_size()
    return dict(zip(terms, values, strict=True))
