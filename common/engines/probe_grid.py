"""Train a grid of MIL probes in one pass, choose one on validation, test it once."""

# L * K probes of the grid, N volumes, C classes

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from common.embeddings.bags import BagBatch, BagReader, EmbeddingBags, ShuffledBatches, check_cohorts
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
    IntervalReport,
    bootstrap,
    groups_of,
    interval_report,
    resample_weights,
)
from common.metrics.multilabel import (
    MultilabelReport,
    average_precision,
    f1_thresholds,
    macro,
    multilabel_report,
)
from common.networks.mil_probe import MILProbe, ProbeGrid, probe_name
from common.networks.poolers import pad_bags
from common.reports.results import Predictions

logger = logging.getLogger(__name__)


class BestProbe:
    """Keeps the probe and step with the highest validation macro AUPRC, with its weights and thresholds.

    Ties keep the earlier step, and within a step the probe that comes first.
    """

    def __init__(self) -> None:
        self.auprc = float("nan")  # before the first validation
        self.index = -1  # among the probes, as in ProbeGrid.names
        self.step = -1
        self.parameters: dict[str, torch.Tensor] = {}
        self.thresholds = torch.empty(0, dtype=torch.float64)  # (C,), best F1 of each class on validation

    def offer(
        self,
        *,
        auprc: np.ndarray,
        step: int,
        weights_of: Callable[[int], dict[str, torch.Tensor]],
        scores: np.ndarray,
        targets: np.ndarray,
    ) -> None:
        """Keep the best probe of this validation if it beats the best so far.

        Args:
            auprc: macro AUPRC of every probe ``(L * K,)``, nan for one that diverged.
            step: optimizer steps taken.
            weights_of: returns a copy of a probe's weights.
            scores: validation scores ``(L * K, N, C)``.
            targets: validation labels ``(N, C)``.
        """
        index = int(np.nanargmax(auprc))
        if auprc[index] <= self.auprc:
            return
        self.auprc, self.index, self.step = float(auprc[index]), index, step
        self.parameters = weights_of(index)
        self.thresholds = torch.from_numpy(f1_thresholds(scores[index], targets))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers only."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        vars(self).update(state)


class ProbeTrainer(SupervisedTrainer, ABC):
    """Train many probes side by side on the same batches, validate them on the way, test the best at the end.

    ``engine.state.output`` is ``[{"loss": mean over the probes that have not diverged}]``;
    ``engine.state.reports`` is empty until the test. A run that resumes after its last step tests at once.

    Args:
        max_epochs: 1: an epoch is all ``max_steps`` steps.
        max_steps: optimizer steps.
        lr_scheduler: stepped after every optimizer step.
        val_interval: steps between two validations; the last step is always validated.
        sampler: the loader's sampler; ``start_step`` is set when a run resumes.
        train_handlers: Ignite handlers.
        others: as MONAI's ``SupervisedTrainer``; the loss is element-wise.
    """

    def __init__(
        self,
        *,
        max_epochs: int,
        max_steps: int,
        lr_scheduler: LRScheduler,
        val_interval: int,
        sampler: Any,  # noqa: ANN401 (torch's samplers have no start_step)
        train_handlers: Sequence[Any],
        **others: Any,  # noqa: ANN401 (MONAI's)
    ) -> None:
        super().__init__(max_epochs=max_epochs, epoch_length=max_steps, decollate=False, **others)
        self.lr_scheduler, self.val_interval, self.sampler = lr_scheduler, val_interval, sampler
        self.num_steps = max_epochs * max_steps
        self.state.reports = {}
        # before the handlers: a checkpoint of this step must hold the choice, a report what the test gave
        self.add_event_handler(Events.STARTED, self.prepare)
        self.add_event_handler(Events.EPOCH_STARTED, self._start_data_at_this_step)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._validate_at_intervals)
        last_step = Events.ITERATION_COMPLETED(once=self.num_steps)
        self.add_event_handler(last_step | Events.COMPLETED, self._test_once)
        self._register_handlers(list(train_handlers))

    def prepare(self) -> None:  # noqa: B027 (nothing to prepare by default)
        """Get ready before the first step."""

    @abstractmethod
    def losses(self, batch: Any) -> torch.Tensor:  # noqa: ANN401 (as the loader gives it)
        """Return the loss of each probe on a batch, of any shape."""

    @abstractmethod
    def validate(self, step: int) -> None:
        """Measure all probes on validation and keep the best."""

    @abstractmethod
    def test(self) -> None:
        """Test the best and fill ``state.reports``."""

    # MONAI annotates a dict, but its handlers read the list that decollating makes of it
    def _iteration(  # type: ignore[override]
        self,
        engine: Engine,
        batchdata: Any,  # noqa: ANN401
    ) -> list[dict[str, torch.Tensor]]:
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(batchdata)
        losses.sum().backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        losses = losses.detach()
        return [{"loss": torch.nanmean(torch.where(losses.isfinite(), losses, torch.nan))}]

    def _start_data_at_this_step(self) -> None:
        """Ignite makes the iterator of the data after this event, and so after a checkpoint was loaded."""
        self.sampler.start_step = self.state.iteration

    def _validate_at_intervals(self) -> None:
        step = self.state.iteration
        if step % self.val_interval == 0 or step == self.num_steps:
            self.validate(step)

    def _test_once(self) -> None:
        if self.state.iteration >= self.num_steps and not self.state.reports:
            self.test()


class ProbeGridTrainer(ProbeTrainer):
    """Train every probe of a grid on the same batches; validate, choose and test them.

    Each probe's loss is the mean binary cross-entropy over the volumes and classes of a batch. Every
    ``val_interval`` steps and after the last, macro AUPRC is measured for every probe on ``val_bags``; the
    single best (probe, step) is kept with per-class thresholds and, after the last step, tested once on
    ``test_bags``. A probe whose scores are not finite is named and cannot be chosen. A metric that a class
    leaves undefined, for want of positives or negatives, is NaN: the class is named and left out of the mean.

    ``engine.state.metrics`` holds ``val_macro_auprc/<pooler>/lr_<lr>`` and ``val_macro_auprc_best``; after
    the test ``test_macro_<metric>`` of the chosen probe. ``engine.state.reports`` then holds the reports of
    "probe" and "prevalence", the floor that one score for all volumes reaches; ``engine.state.intervals``
    their bootstrap intervals; ``engine.state.predictions`` and ``engine.state.validation`` what the chosen
    probe says of both cohorts; and ``engine.state.seed_reports`` the reports of the chosen probe by seed, the
    run's first.

    Source: DALE-CT IV-B.

    Args:
        train_data_loader: endless batches of ``EmbeddingBags``, by ``ShuffledBatches`` and ``collate_bags``.
        network: the grid.
        val_bags: volumes to choose on.
        test_bags: volumes to test on.
        best: the choice so far; saved in checkpoints.
        further_seeds: seeds to train the chosen probe again with.
        num_resamples: bootstrap resamples of the test set.
        resampling: "patients" or "volumes": what a resample draws.
        others: as :class:`ProbeTrainer`.

    Raises:
        ValueError: if the three cohorts' embeddings differ in origin or width or share a volume; in training,
            if no class of the validation set has a positive or an embedding is empty or not finite.
        FloatingPointError: in training, if every probe has diverged.
    """

    def __init__(
        self,
        *,
        train_data_loader: DataLoader[Any],
        network: ProbeGrid,
        val_bags: EmbeddingBags,
        test_bags: EmbeddingBags,
        best: BestProbe,
        further_seeds: Sequence[int],
        num_resamples: int,
        resampling: str,
        **others: Any,  # noqa: ANN401 (the trainer's)
    ) -> None:
        self.grid, self.best = network, best
        self.batches = cast(ShuffledBatches, train_data_loader.batch_sampler)
        self.train_bags = cast(EmbeddingBags, train_data_loader.dataset)
        self.val_bags, self.test_bags = val_bags, test_bags
        self.cohorts = {"train": self.train_bags, "validation": val_bags, "test": test_bags}
        check_cohorts(self.cohorts, resampling)
        self.further_seeds = list(further_seeds)
        self.readers: dict[str, BagReader] = {}
        self.fixed: dict[str, torch.Tensor] = {}
        groups = groups_of(test_bags.volumes, resampling)
        self.weights = resample_weights(groups, num_resamples, RESAMPLING_SEED)
        super().__init__(train_data_loader=train_data_loader, network=network, sampler=self.batches, **others)

    def chosen_probe(self) -> MILProbe:
        """Return the best probe so far, with the weights it had when it was chosen."""
        probe = self.grid.probe(self.best.index)
        probe.load_state_dict(self.best.parameters)
        return probe

    def losses(self, batch: BagBatch) -> torch.Tensor:
        """Return the mean loss of each probe, ``(L * K,)``."""
        chosen = batch["index"].tolist()
        logits = self.inferer(self.fixed["train"][chosen], self.network, self.readers["train"](chosen))
        targets = batch["labels"].to(logits, non_blocking=True).expand_as(logits)
        return self.loss_function(logits, targets).mean(dim=(1, 2))

    def prepare(self) -> None:
        """Apply the poolers without parameters, which give the same at every step; finds any damaged bag."""
        for cohort, bags in self.cohorts.items():
            self.readers[cohort] = BagReader(bags, self.state.device)
            self.fixed[cohort] = torch.cat(
                [
                    self.grid.fixed_features(chunk) if cohort != "test" else torch.empty(0)
                    for _, chunk in self.readers[cohort].chunks()
                ]
            )

    def validate(self, step: int) -> None:
        """Measure macro AUPRC of all probes and keep the best."""
        names = [probe_name(*name) for name in self.grid.names]
        targets = self.val_bags.labels.numpy()
        scores = self._validation_scores()
        finite = np.isfinite(scores).all(axis=(1, 2))
        if not finite.any():
            raise FloatingPointError(f"Every probe gives NaN or Inf at step {step}. Lower learning_rates.")
        if not finite.all():
            diverged = [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
            logger.warning("Step %d: %s diverged and cannot be chosen.", step, diverged)
        per_class = np.full((len(scores), targets.shape[1]), np.nan)
        per_class[finite] = average_precision(scores[finite], targets)
        means = np.array([macro(values, self.val_bags.class_names)[0] for values in per_class])
        if np.isnan(means).all():
            raise ValueError(f"None of the {len(targets)} validation volumes is positive of any class.")
        self.best.offer(
            auprc=means,
            step=step,
            weights_of=lambda index: self.grid.probe(index).state_dict(),
            scores=scores,
            targets=targets,
        )
        by_probe = {f"val_macro_auprc/{name}": float(mean) for name, mean in zip(names, means, strict=True)}
        self.state.metrics |= by_probe | {"val_macro_auprc_best": self.best.auprc}
        logger.info(
            "Step %d: best validation macro AUPRC %.4f, by %s at step %d.",
            *(step, self.best.auprc, names[self.best.index], self.best.step),
        )

    def test(self) -> None:
        """Test the chosen probe, the floor, and the chosen probe trained with further seeds."""
        names, thresholds = self.test_bags.class_names, self.best.thresholds.numpy()
        self.state.validation, self.state.predictions = (
            Predictions(
                bags.identity["encoder"],
                *(bags.volumes, names, probe_scores(self.chosen_probe(), self.readers[cohort]), thresholds),
                bags.labels.double().numpy(),
            )
            for cohort, bags in list(self.cohorts.items())[1:]
        )
        reports, self.state.intervals = measured_beside_floor(self.state.predictions, self.weights)
        further = self.train_seeds(self.further_seeds)
        self.state.seed_reports = [reports["probe"], *map(self._report_of_seed, further)]
        self.state.reports = reports
        macro_means = reports["probe"]["macro"]
        self.state.metrics |= {f"test_macro_{metric}": value for metric, value in macro_means.items()}

    def train_seeds(self, seeds: Sequence[int]) -> list[MILProbe]:
        """Train the chosen probe anew for each seed, for the chosen number of steps, in one pass.

        A seed decides on the initial weights and on the order of the batches: on all that chance decides in
        training a probe. The probes share no parameter, so that each ends where it would alone.
        """
        if not seeds:
            return []
        pooler, learning_rate = self.grid.names[self.best.index]
        rate, place = divmod(self.best.index, len(self.grid.kinds))
        logger.info(
            "Training %s for %d steps with the seeds %s.",
            *(probe_name(pooler, learning_rate), self.best.step, [*seeds]),
        )
        first = self.grid.kinds[:place].count("fixed")
        fixed = self.fixed["train"][:, first : first + (self.grid.kinds[place] == "fixed")]
        labels, batch_size = self.train_bags.labels.to(self.state.device), self.batches.batch_size
        shape: dict[str, Any] = {"dim": self.grid.dim, "num_classes": self.grid.num_classes}
        shape |= {"standardizer": self.grid.standardizer, "prior_logits": self.grid.prior_logits}
        grids = [
            ProbeGrid(poolers=[pooler], learning_rates=[learning_rate], **shape, seed=seed) for seed in seeds
        ]
        grids = [grid.to(self.grid.weights[0]) for grid in grids]
        batches = [ShuffledBatches(len(labels), batch_size, seed) for seed in seeds]
        # AdamW's defaults hold more than it accepts
        accepted = inspect.signature(type(self.optimizer)).parameters
        settings = {name: value for name, value in self.optimizer.defaults.items() if name in accepted}
        groups = [group for grid in grids for group in grid.parameter_groups()]
        optimizer = type(self.optimizer)(groups, **settings)
        scheduler = LambdaLR(optimizer, cast(LambdaLR, self.lr_scheduler).lr_lambdas[rate])
        for step in range(self.best.step):
            optimizer.zero_grad(set_to_none=True)
            loss = labels.new_zeros(())
            for grid, batches_of_seed in zip(grids, batches, strict=True):
                chosen = batches_of_seed.batch(step)
                logits = grid(fixed[chosen], self.readers["train"](chosen))[0]
                loss = loss + self.loss_function(logits, labels[chosen].to(logits)).mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
        return [grid.probe(0) for grid in grids]

    def _report_of_seed(self, probe: MILProbe) -> MultilabelReport:
        """Test a probe with the thresholds that suit it best on validation."""
        val_scores = probe_scores(probe, self.readers["validation"])
        thresholds = f1_thresholds(val_scores, self.val_bags.labels.numpy())
        scores, targets = probe_scores(probe, self.readers["test"]), self.test_bags.labels.numpy()
        return multilabel_report(scores, targets, thresholds, self.test_bags.class_names)

    @torch.no_grad()
    def _validation_scores(self) -> np.ndarray:
        """Probabilities of every probe, float64 (L * K, N, C)."""
        self.network.eval()
        parts = []
        for rows, chunk in self.readers["validation"].chunks():
            logits = self.inferer(self.fixed["validation"][rows], self.network, chunk)
            parts.append(logits.double().sigmoid().cpu())
        return torch.cat(parts, dim=1).numpy()


def measured_beside_floor(
    predictions: Predictions, weights: np.ndarray
) -> tuple[dict[str, MultilabelReport], dict[str, IntervalReport]]:
    """Measure predictions ("probe"), and one score for all volumes ("prevalence"): reports and intervals.

    ``weights (R, N)`` come from :func:`common.metrics.bootstrap.resample_weights`.
    """
    names, targets = predictions.class_names, predictions.labels
    scored = {
        "probe": (predictions.probabilities, targets, predictions.thresholds),
        # all of them called positive: AUROC .5, AUPRC p, F1 2p / (1 + p)
        "prevalence": (np.zeros(targets.shape), targets, np.zeros(len(names))),
    }
    reports = {subject: multilabel_report(*of, names) for subject, of in scored.items()}
    return reports, {
        subject: interval_report(bootstrap(*of, weights), names) for subject, of in scored.items()
    }


@torch.no_grad()
def probe_scores(probe: MILProbe, reader: BagReader) -> np.ndarray:
    """Return the probabilities that a probe gives to all volumes of a cohort, float64 ``(N, C)``."""
    parts = [probe(*pad_bags(chunk)).double().sigmoid().cpu() for _, chunk in reader.chunks()]
    return torch.cat(parts).numpy()
