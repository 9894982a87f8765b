"""LeJEPA pretraining on slabs: one iteration is Eq. 3 of the paper."""

# B slabs, V views (Vg global, Vl local), S view size, D embedding, C classes, P patches

from collections.abc import Iterable, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.losses.auxiliary import AuxiliaryBCELoss
from common.losses.lejepa import LeJEPALoss
from common.metrics.effective_rank import effective_rank
from common.transforms.hounsfield import HUWindow
from common.transforms.photometric import photometric
from common.transforms.soft_labels import coverage_fractions, finding_presence


class LeJEPATrainer(SupervisedTrainer):
    """Train encoder, projector and auxiliary head on views of slabs.

    Every random number of an iteration is a function of the run's seed and the step: the data set draws views
    from the sample's position, SIGReg its directions from the step. A resumed run therefore equals an
    unbroken one and a run on several ranks the run on one with the same global batch.

    ``engine.state.output`` is MONAI's decollated ``[{"loss": ..., <term>: ...}]``, detached means over all
    ranks.

    Source: DALE-CT III-C, Eq. 1-3.

    Args:
        device: device of network and batch.
        max_epochs: number of epochs; an epoch is just ``epoch_length`` steps.
        epoch_length: optimizer steps in an epoch.
        train_data_loader: endless batches of ``SlabViews`` samples.
        network: ``PretrainingModel``, wrapped for distribution or not.
        optimizer: optimizer over all its parameters.
        lr_scheduler: stepped after every optimizer step.
        loss_function: Eq. 1.
        auxiliary_loss: Eq. 2, or None (DALE-CT-0).
        aux_weight: weight of the auxiliary loss, Eq. 3's lambda_aux.
        hu_window: clip window and z-score of the input.
        patch_size_px: side of a patch, for the patch targets.
        clip_norm: largest global norm of the gradient.
        amp_dtype: "bfloat16" for autocast, "float32" for none.
        rank_every: iterations between measurements of the CLS tokens' effective rank.
        inferer: how views go through the network; MONAI's SimpleInferer by default.
        train_handlers: Ignite handlers.

    Raises:
        ValueError: if ``amp_dtype`` is neither of the two.
        FloatingPointError: in training, if the loss of a step is not finite; names the step and the volumes.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        epoch_length: int,
        train_data_loader: Iterable,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        loss_function: LeJEPALoss,
        auxiliary_loss: AuxiliaryBCELoss | None,
        aux_weight: float,
        hu_window: HUWindow,
        patch_size_px: int,
        clip_norm: float,
        amp_dtype: str,
        rank_every: int,
        inferer: Inferer | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
        if amp_dtype not in ("bfloat16", "float32"):
            raise ValueError(f"amp_dtype must be 'bfloat16' or 'float32', got {amp_dtype!r}.")
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            epoch_length=epoch_length,
            inferer=inferer,
            decollate=False,
        )
        self.lr_scheduler = lr_scheduler
        self.auxiliary_loss = auxiliary_loss.to(device) if auxiliary_loss is not None else None
        self.aux_weight = aux_weight
        self.hu_window = hu_window
        self.patch_size_px = patch_size_px
        self.clip_norm = clip_norm
        self.autocast = torch.autocast(
            self.state.device.type, torch.bfloat16, enabled=amp_dtype == "bfloat16"
        )
        self.rank_every = rank_every
        self.add_event_handler(Events.EPOCH_STARTED, _start_data_at_this_step)
        self._register_handlers(list(train_handlers or []))

    def _iteration(  # type: ignore[override]
        self, engine: Engine, batchdata: dict[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        batch = {
            name: value.to(self.state.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batchdata.items()
        }
        num_global = batch["global_views"].shape[1]
        views = {
            "global": self._normalized(batch, "global_views", slice(0, num_global)),
            "local": self._normalized(batch, "local_views", slice(num_global, None)),
        }
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            output = self.inferer(views["global"], self.network, views["local"])
        # the loss runs in float32: SIGReg integrates characteristic functions, which bf16 cannot resolve
        terms = self.loss_function(
            output["projections"].float(), num_global=num_global, step=engine.state.iteration
        )
        loss = terms["loss"]
        if self.auxiliary_loss is not None:
            auxiliary = self.auxiliary_loss(
                output["logits"], self._targets(batch), has_ts=batch["has_ts"], has_rex=batch["has_rex"]
            )
            loss = loss + self.aux_weight * auxiliary["loss"]
            terms |= {
                ("aux" if name == "loss" else f"aux_{name}"): value for name, value in auxiliary.items()
            }
        terms |= {"loss": loss, "lejepa": terms["loss"]}
        means = _means_over_ranks(terms)
        if not torch.isfinite(means["loss"]):
            raise FloatingPointError(
                f"loss must be finite, got {means['loss'].item()} at step {engine.state.iteration} "
                f"for volumes {sorted(set(batch['volume']))}. Lower lr, or set amp_dtype to float32."
            )
        loss.backward()
        means["grad_norm"] = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm).detach()
        self.optimizer.step()
        self.lr_scheduler.step()
        if engine.state.iteration % self.rank_every == 0:
            engine.state.metrics["cls_effective_rank"] = effective_rank(output["cls"].flatten(0, 1))
        return [means]

    def _normalized(self, batch: dict[str, Any], name: str, views: slice) -> torch.Tensor:
        return photometric(
            batch[name], batch["gamma"][:, views], batch["blur_sigma"][:, views], self.hu_window
        )

    def _targets(self, batch: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
        targets: dict[str, dict[str, torch.Tensor]] = {}
        for group in ("global", "local"):
            targets[group] = {}
            for source, soft_labels in (("ts", coverage_fractions), ("rex", finding_presence)):
                maps = batch[f"{group}_{source}"]
                cls, patches = soft_labels(maps.flatten(0, 1), self.patch_size_px)
                targets[group][f"{source}_cls"] = cls.unflatten(0, maps.shape[:2])
                targets[group][f"{source}_patch"] = patches.unflatten(0, maps.shape[:2])
        return targets


def _start_data_at_this_step(engine: LeJEPATrainer) -> None:
    """Ignite iterates over the data after the first EPOCH_STARTED, thus after a checkpoint was loaded."""
    engine.data_loader.batch_sampler.start_step = engine.state.iteration  # type: ignore[union-attr]


def _means_over_ranks(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every term is a mean whose average over the ranks is the value of the global batch."""
    values = torch.stack([value.detach().float() for value in terms.values()])
    if idist.get_world_size() > 1:
        values = torch.as_tensor(idist.all_reduce(values)) / idist.get_world_size()
    return dict(zip(terms, values, strict=True))
