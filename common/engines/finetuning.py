"""Fine-tuning: an encoder of slices and a MIL probe learn together, from CTs to labels."""

# B volumes of a global batch, N volumes of a cohort, C classes

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from common.embeddings.bags import ShuffledBatches, check_disjoint
from common.embeddings.ct_bags import CTBags
from common.engines.pretraining_trainer import means_over_ranks
from common.engines.probe_grid import BestProbe, ProbeTrainer, measured_beside_floor
from common.metrics.bootstrap import RESAMPLING_SEED, groups_of, resample_weights
from common.metrics.multilabel import average_precision, macro
from common.networks.pretraining_model import clip_by_global_norm, gradients_stay_here
from common.reports.results import Predictions
from common.run.process import gather_objects

logger = logging.getLogger(__name__)


class FineTuner(ProbeTrainer):
    """Train on whole volumes, one after the other; a step is one optimizer step on a global batch of them.

    The loss is the mean binary cross-entropy over the volumes and classes of the batch, as of a MIL probe.
    Each rank takes every n-th volume of it; gradients add up until the last, so that neither the number of
    ranks nor memory changes the step. All random numbers are functions of seed, step and place in the batch.
    Validation, choice and test are those of ``ProbeGridTrainer``: macro AUPRC every ``val_interval`` steps
    and after the last, the best step tested once.

    ``engine.state.metrics``, ``reports``, ``intervals``, ``predictions`` and ``validation`` are those of
    ``ProbeGridTrainer``.

    Args:
        train_data_loader: ``ShuffledBatches`` of places in ``train_bags``.
        cohorts: CTs by "train", "validation" and "test".
        best: the choice so far, of one probe and what learns beneath it; saved in checkpoints.
        clip_norm: largest global norm of the gradient; None for any.
        seed: seed of dropout.
        encoder_name: name of the encoder, for reports.
        num_resamples: bootstrap resamples of the test set.
        resampling: "patients" or "volumes": what a resample draws.
        others: as :class:`ProbeTrainer`; ``network`` is a ``FineTunedProbe``.

    Raises:
        ValueError: if two cohorts share a patient; in training, if no class of the validation set has a
            positive.
        FloatingPointError: in training, if the loss or a validation score is not finite.
    """

    def __init__(
        self,
        *,
        train_data_loader: ShuffledBatches,
        cohorts: Mapping[str, CTBags],
        best: BestProbe,
        clip_norm: float | None,
        seed: int,
        encoder_name: str,
        num_resamples: int,
        resampling: str,
        **others: Any,  # noqa: ANN401 (the trainer's)
    ) -> None:
        self.cohorts, self.best, self.clip_norm, self.seed = dict(cohorts), best, clip_norm, seed
        self.encoder_name = encoder_name
        groups = {name: groups_of(bags.volumes, resampling) for name, bags in cohorts.items()}
        check_disjoint(groups, resampling)
        self.weights = resample_weights(groups["test"], num_resamples, RESAMPLING_SEED)
        self.images: Iterator[torch.Tensor] = iter(())
        super().__init__(train_data_loader=train_data_loader, sampler=train_data_loader, **others)

    def _start_data_at_this_step(self) -> None:
        super()._start_data_at_this_step()
        steps = itertools.count(self.state.iteration)
        mine = (index for step in steps for index, _ in rank_share(self.sampler.batch(step)))
        self.images = self.cohorts["train"].read(mine)

    def losses(self, batch: Any) -> torch.Tensor:  # noqa: ANN401 (ProbeTrainer's)
        """Compute the loss of a batch, its places in the cohort, and its gradient."""
        bags, share = self.cohorts["train"], rank_share(batch)
        total = torch.zeros((), device=self.state.device)
        for nth, (index, weight) in enumerate(share):
            place = nth * idist.get_world_size() + idist.get_rank()
            seeds = np.random.SeedSequence([self.seed, self.state.iteration, place]).generate_state(1)
            torch.manual_seed(int(seeds[0]))  # of dropout
            with gradients_stay_here(self.network, unless=nth == len(share) - 1):
                logits = self.inferer(next(self.images), self.network)
                loss = self.loss_function(logits, bags.labels[index].to(logits)).mean() * weight
                loss.backward()
            total += loss.detach()
        return means_over_ranks({"loss": total})["loss"]

    # MONAI annotates a dict, but its handlers read the list that decollating makes of it
    def _iteration(  # type: ignore[override]
        self,
        engine: Engine,
        batchdata: list[int],
    ) -> list[dict[str, torch.Tensor]]:
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.losses(batchdata)
        if not loss.isfinite():
            volumes = [self.cohorts["train"].volumes[index] for index in batchdata]
            raise FloatingPointError(f"The loss is {loss} at step {self.state.iteration}, of {volumes}.")
        terms = {"loss": loss}
        if self.clip_norm is not None:
            terms["grad_norm"] = clip_by_global_norm(self.network, self.clip_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        return [terms]

    def validate(self, step: int) -> None:
        """Measure macro AUPRC and keep the weights if they are the best."""
        bags = self.cohorts["validation"]
        scores, targets = self._scores(bags), bags.labels.numpy()
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"Scores are NaN or Inf at step {step}. Lower encoder_lr or probe_lr.")
        auprc = macro(average_precision(scores, targets), bags.class_names)[0]
        if np.isnan(auprc):
            raise ValueError(f"None of the {len(bags)} validation volumes is positive of any class.")
        self.best.offer(
            auprc=np.array([auprc]),
            step=step,
            weights_of=lambda _: self._learned(),
            scores=scores[None],
            targets=targets,
        )
        self.state.metrics |= {"val_macro_auprc": auprc, "val_macro_auprc_best": self.best.auprc}
        logger.info(
            "Step %d: validation macro AUPRC %.4f, best %.4f at step %d.",
            *(step, auprc, self.best.auprc, self.best.step),
        )

    def test(self) -> None:
        """Test the best weights; the network has its last ones again afterwards."""
        last = self._learned()
        self._set(self.best.parameters)
        thresholds = self.best.thresholds.numpy()
        self.state.validation, self.state.predictions = (
            Predictions(
                self.encoder_name,
                *(bags.volumes, bags.class_names, self._scores(bags), thresholds),
                bags.labels.double().numpy(),
            )
            for bags in (self.cohorts["validation"], self.cohorts["test"])
        )
        self._set(last)
        reports, self.state.intervals = measured_beside_floor(self.state.predictions, self.weights)
        self.state.reports = reports
        macro_means = reports["probe"]["macro"]
        self.state.metrics |= {f"test_macro_{metric}": value for metric, value in macro_means.items()}

    @torch.no_grad()
    def _scores(self, bags: CTBags) -> np.ndarray:
        """Probabilities of a cohort, float64 (N, C), the same on every rank."""
        self.network.eval()
        share = rank_share(range(len(bags)))
        images = bags.read(index for index, _ in share)
        found = {
            index: self.inferer(next(images), self.network).double().sigmoid().cpu().numpy()
            for index, _ in share
        }
        if isinstance(self.network, FSDPModule):  # as the backward pass would: its weights can be set again
            self.network.reshard()
        by_index = {index: row for of_rank in gather_objects(found) for index, row in of_rank.items()}
        return np.stack([by_index[index] for index in range(len(bags))])

    def _learned(self) -> dict[str, torch.Tensor]:
        """Return a copy of what learns, whole on every rank, under plain names."""
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        state = cast(dict[str, torch.Tensor], get_model_state_dict(self.network, options=options))
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _set(self, parameters: Mapping[str, torch.Tensor]) -> None:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.network, dict(parameters), options=options)


def rank_share(batch: Sequence[int]) -> list[tuple[int, float]]:
    """Return this rank's volumes of a global batch, each with its weight in the mean over ranks.

    Every rank gets as many, since the ranks of a sharded network must run it equally often: where volumes run
    out, it gets one again, with weight 0.

    Example:
        >>> rank_share([7, 3])
        [(7, 0.5), (3, 0.5)]
    """
    world, size = idist.get_world_size(), len(batch)
    places = range(idist.get_rank(), -(-size // world) * world, world)
    return [(batch[place % size], world / size if place < size else 0.0) for place in places]
