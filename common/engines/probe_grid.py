"""Train a grid of MIL probes in one pass, choose one on validation, test it once."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from common.embeddings.bags import BagReader, EmbeddingBags, ShuffledBatches, chunks
from common.engines.probe_cohorts import check_cohorts
from common.engines.probe_seeds import train_seeds
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
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

# L * K probes of the grid, N volumes, C classes


class BestProbe:
    """Keeps the probe and step with the highest validation macro AUPRC, with its weights and thresholds.

    Ties keep the earlier step, and within a step the probe that the grid names first.

    Attributes:
        auprc: its validation macro AUPRC; nan before the first validation.
        index: its place in ``ProbeGrid.names``.
        step: optimizer steps it was trained for.
        parameters: its state dictionary.
        thresholds: float64 ``(C,)``, per-class optimum of F1 on validation.
    """

    def __init__(self) -> None:
        self.auprc = float("nan")
        self.index = -1
        self.step = -1
        self.parameters: dict[str, torch.Tensor] = {}
        self.thresholds = torch.empty(0, dtype=torch.float64)

    def offer(
        self, auprc: np.ndarray, step: int, network: ProbeGrid, scores: np.ndarray, targets: np.ndarray
    ) -> None:
        """Keep the best probe of this validation if it beats the best so far.

        Args:
            auprc: macro AUPRC of every probe, nan for one that diverged.
            step: optimizer steps taken.
            network: grid whose weights are copied.
            scores: validation scores.
            targets: validation labels.

        Shape:
            ``auprc (L * K,)``, ``scores (L * K, N, C)``, ``targets (N, C)``.
        """
        index = int(np.nanargmax(auprc))
        if auprc[index] <= self.auprc:
            return
        self.auprc, self.index, self.step = float(auprc[index]), index, step
        self.parameters = network.probe(index).state_dict()
        self.thresholds = torch.from_numpy(
            np.asarray(f1_thresholds(scores[index], targets), dtype=np.float64)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers only."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        vars(self).update(state)


# B bags, N volumes, S slices, D embedding, C classes, L * K probes of the grid, F fixed poolers


logger = logging.getLogger(__name__)


class ProbeGridTrainer(SupervisedTrainer):
    """Train every probe of a grid on the same batches; validate, choose and test them.

    Each probe's loss is the mean binary cross-entropy over the volumes and classes of a batch. Every
    ``val_interval`` steps and after the last, macro AUPRC is measured for every probe on ``val_bags``; the
    single best (probe, step) is kept with per-class thresholds and, after the last step, tested once on
    ``test_bags``. A probe whose scores are not finite is named and cannot be chosen. A metric that a class
    leaves undefined, for want of positives or negatives, is NaN: the class is named and left out of the mean.

    ``engine.state.output`` is ``[{"loss": mean over the probes}]``. ``engine.state.metrics`` holds
    ``val_macro_auprc/<pooler>/lr_<lr>`` and ``val_macro_auprc_best``; after the test ``test_macro_<metric>``
    of the chosen probe. ``engine.state.reports`` then holds the reports of "probe" and "prevalence": the
    floor that the same score for every volume reaches, computed by the same code (AUROC and balanced
    accuracy .5, AUPRC the prevalence p, F1 2p / (1 + p) of calling every volume positive);
    ``engine.state.intervals`` their bootstrap intervals; ``engine.state.predictions`` and
    ``engine.state.validation`` what the chosen probe says of both cohorts; and ``engine.state.seed_reports``
    the reports of the chosen probe by seed, the run's own seed first. A further seed trains the chosen pooler
    at the chosen learning rate for the chosen number of steps, with initial weights and batches of its own.

    Bags stay on the device if they fit, see :class:`common.embeddings.bags.BagReader`.

    Source: DALE-CT IV-B.

    Args:
        device: device of network and batch.
        max_epochs: 1: an epoch is just ``epoch_length`` steps.
        epoch_length: optimizer steps of the whole run.
        train_data_loader: endless batches of ``EmbeddingBags``, by ``ShuffledBatches`` and ``collate_bags``;
            a bag is read from the data set when the step needs it.
        val_bags: volumes to choose on.
        test_bags: volumes to test on.
        network: the grid.
        optimizer: optimizer over ``network.parameter_groups()``.
        lr_scheduler: stepped after every optimizer step.
        loss_function: element-wise loss of logits and labels.
        best: the choice so far; saved in checkpoints.
        val_interval: steps between two validations.
        further_seeds: seeds to train the chosen probe again with.
        num_resamples: bootstrap resamples of the test set; our choice: 2,000.
        resampling: "patients" or "volumes": what a resample draws.
        inferer: how a batch goes through the network; MONAI's SimpleInferer by default.
        train_handlers: Ignite handlers.

    Raises:
        ValueError: if the three cohorts' embeddings differ in origin or width or share a volume; in training,
            if no class of the validation set has a positive or an embedding is empty or not finite.
        FloatingPointError: in training, if every probe has diverged.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        epoch_length: int,
        train_data_loader: DataLoader[Any],
        val_bags: EmbeddingBags,
        test_bags: EmbeddingBags,
        network: ProbeGrid,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        loss_function: nn.Module,
        best: BestProbe,
        val_interval: int,
        further_seeds: Sequence[int] = (),
        num_resamples: int = 2000,
        resampling: str = "patients",
        inferer: Inferer | None = None,
        train_handlers: Sequence[Any] | None = None,
    ) -> None:
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
        self.grid = network
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
        self.lr_scheduler = lr_scheduler
        self.best = best
        self.val_interval = val_interval
        self.num_steps = max_epochs * epoch_length
        self.state.reports = {}
        # before the handlers: a checkpoint of this step must hold the choice, a report what the test gave
        self.add_event_handler(Events.STARTED, self._pool_once)
        self.add_event_handler(Events.EPOCH_STARTED, self._start_data_at_this_step)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._validate)
        self.add_event_handler(
            Events.ITERATION_COMPLETED(once=self.num_steps) | Events.COMPLETED, self._test_once
        )
        self._register_handlers(list(train_handlers or []))

    def chosen_probe(self) -> MILProbe:
        """Return the best probe so far, with the weights it had when it was chosen."""
        probe = self.grid.probe(self.best.index)
        probe.load_state_dict(self.best.parameters)
        return probe

    # MONAI annotates a dict, but its handlers read the list that decollating makes of it
    def _iteration(  # type: ignore[override]
        self, engine: Engine, batchdata: dict[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        chosen = batchdata["index"].tolist()
        logits = self.inferer(self.fixed["train"][chosen], self.network, self.readers["train"](chosen))
        targets = batchdata["labels"].to(logits, non_blocking=True).expand_as(logits)
        losses = self.loss_function(logits, targets).mean(dim=(1, 2))
        losses.sum().backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        losses = losses.detach()
        return [{"loss": torch.nanmean(torch.where(losses.isfinite(), losses, torch.nan))}]

    def _pool_once(self, engine: Engine) -> None:
        """Poolers without parameters give the same vector at every step; a damaged bag is found here."""
        for cohort, bags in self.cohorts.items():
            self.readers[cohort] = BagReader(bags, self.state.device)
            self.fixed[cohort] = torch.cat(
                [
                    self.grid.fixed_features(chunk) if cohort != "test" else torch.empty(0)
                    for _, chunk in self._chunks(cohort)
                ]
            )

    def _start_data_at_this_step(self, engine: Engine) -> None:
        """Ignite makes the iterator of the data after this event, and thus after a checkpoint was loaded."""
        self.batches.start_step = self.state.iteration

    def _validate(self, engine: Engine) -> None:
        step = self.state.iteration
        if step % self.val_interval and step != self.num_steps:
            return
        names = [probe_name(*name) for name in self.grid.names]
        targets = self.val_bags.labels.numpy()
        scores = self._grid_scores("validation")
        means = _macro_auprc(scores, targets, self.val_bags.class_names)
        diverged = [
            name for name, of_probe in zip(names, scores, strict=True) if not np.isfinite(of_probe).all()
        ]
        if len(diverged) == len(names):
            raise FloatingPointError(
                f"scores must be finite, got NaN from every probe at step {step}. Lower learning_rates."
            )
        if diverged:
            logger.warning("Step %d: %s diverged and cannot be chosen.", step, diverged)
        if np.isnan(means).all():
            raise ValueError(
                f"validation must have a positive of some class, got none in {len(targets)} volumes."
            )
        self.best.offer(means, step, self.grid, scores, targets)
        by_probe = {f"val_macro_auprc/{name}": float(mean) for name, mean in zip(names, means, strict=True)}
        self.state.metrics |= by_probe | {"val_macro_auprc_best": self.best.auprc}
        logger.info(
            "Step %d: best validation macro AUPRC %.4f, by %s at step %d.",
            *(step, self.best.auprc, names[self.best.index], self.best.step),
        )

    def _test_once(self, engine: Engine) -> None:
        """After the last step, or when a run resumes that was killed between that and its report."""
        if self.state.iteration < self.num_steps or self.state.reports:
            return
        names, targets = self.test_bags.class_names, self.test_bags.labels.double().numpy()
        thresholds = self.best.thresholds.numpy()
        self.state.validation, self.state.predictions = (
            Predictions(
                bags.identity["encoder"],
                *(bags.volumes, names, self._probe_scores(self.chosen_probe(), cohort), thresholds),
                bags.labels.double().numpy(),
            )
            for cohort, bags in list(self.cohorts.items())[1:]
        )
        scores = self.state.predictions.probabilities
        report = multilabel_report(scores, targets, thresholds, names)
        same_for_all = (np.zeros(targets.shape), targets, np.zeros(len(names)))
        self.state.intervals = {
            "probe": interval_report(bootstrap(scores, targets, thresholds, self.weights), names),
            "prevalence": interval_report(bootstrap(*same_for_all, self.weights), names),
        }
        further = train_seeds(
            *(self.further_seeds, self.grid, self.best.index, self.best.step, self.batches.batch_size),
            *(self.readers["train"], self.fixed["train"], self.train_bags.labels.to(self.state.device)),
            *(self.loss_function, self.optimizer, self.lr_scheduler),
        )
        self.state.seed_reports = [report, *map(self._report_of_seed, further)]
        self.state.reports = {"probe": report, "prevalence": prevalence_report(targets, names)}
        self.state.metrics |= {f"test_macro_{metric}": value for metric, value in report["macro"].items()}

    def _report_of_seed(self, probe: MILProbe) -> MultilabelReport:
        """Test a probe with thresholds of its own."""
        val_scores = self._probe_scores(probe, "validation")
        thresholds = f1_thresholds(val_scores, self.val_bags.labels.numpy())
        scores, targets = self._probe_scores(probe, "test"), self.test_bags.labels.numpy()
        return multilabel_report(scores, targets, thresholds, self.test_bags.class_names)

    @torch.no_grad()
    def _grid_scores(self, cohort: str) -> np.ndarray:
        """Probabilities of every probe, float64 (L * K, N, C)."""
        self.network.eval()
        parts = []
        for rows, chunk in self._chunks(cohort):
            logits = self.inferer(self.fixed[cohort][rows], self.network, chunk)
            parts.append(logits.double().sigmoid().cpu())
        return torch.cat(parts, dim=1).numpy()

    @torch.no_grad()
    def _probe_scores(self, probe: MILProbe, cohort: str) -> np.ndarray:
        """Probabilities of one probe, float64 (N, C)."""
        parts = [probe(*pad_bags(chunk)).double().sigmoid().cpu() for _, chunk in self._chunks(cohort)]
        return torch.cat(parts).numpy()

    def _chunks(self, cohort: str) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        for places in chunks(self.cohorts[cohort]):
            yield slice(places.start, places.stop), self.readers[cohort](places)


def prevalence_report(targets: np.ndarray, class_names: Sequence[str]) -> MultilabelReport:
    """Report on a probe that knows nothing: it gives all volumes one score and calls them all positive.

    Args:
        targets: labels of the test set.
        class_names: names of the classes.

    Shape:
        ``targets (N, C)``.
    """
    return multilabel_report(np.zeros(targets.shape), targets, np.zeros(targets.shape[1]), class_names)


def _macro_auprc(scores: np.ndarray, targets: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Macro AUPRC of every probe; NaN for one with a score that is not finite."""
    finite = np.isfinite(scores).all(axis=(1, 2))
    per_class = np.full((len(scores), targets.shape[1]), np.nan)
    per_class[finite] = average_precision(scores[finite], targets)
    return np.array([macro(values, class_names)[0] for values in per_class])
