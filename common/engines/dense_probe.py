"""Train linear probes of CLS and patch tokens in one pass, choose on validation, test once."""

# L learning rates, K = 2 kinds of tokens, B rows of a batch, D embedding, C classes of all tasks

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from common.cohort.cohort import load_labels
from common.embeddings.dense_cohort import TOKEN_KINDS, DenseCohort, DrawnRows, RemainingSteps
from common.engines.best_layers import BestLayers
from common.engines.dense_scores import report_on_test, validation_auprc
from common.metrics.bootstrap import RESAMPLING_SEED
from common.networks.dense_probe import DenseProbes

logger = logging.getLogger(__name__)

BACKGROUND = "background"
"""Trained on and listed, but in no macro mean: it is no organ, and nearly every slice shows some."""


class DenseProbeTrainer(SupervisedTrainer):
    """Train every probe on its own kind of token; validate, choose and test for each kind and task.

    Each probe's loss is the mean binary cross-entropy over the rows and classes of a batch. Every
    ``val_interval`` steps and after the last, macro AUPRC is measured on ``val_cohort`` for every probe, a
    class counting as present where its share is above 0; the best learning rate and step of each kind and
    task are kept and, after the last step, tested once on ``test_cohort``.

    Macro means of validation are over the classes with a positive there, those of the test over the classes
    with ``min_positives``; the background is in neither.

    ``engine.state.output`` is ``[{"loss": mean over the probes}]``. ``engine.state.metrics`` holds
    ``val_macro_auprc/<kind>/<task>/lr_<lr>`` and ``val_macro_auprc_best/<kind>/<task>``; after the test
    ``test_macro_<metric>/<kind>/<task>``. ``engine.state.reports`` then holds what
    :func:`common.engines.dense_scores.report_on_test` returns, by (kind, task).

    Source: DALE-CT IV-A3 and its released code.

    Args:
        device: device of network and batch.
        max_epochs: 1: an epoch is just ``epoch_length`` steps.
        epoch_length: optimizer steps of the whole run.
        train_data_loader: batches of ``DrawnRows`` in the order of ``RemainingSteps``.
        val_cohort: volumes to choose on.
        test_cohort: volumes to test on.
        network: the probes.
        optimizer: optimizer over ``network.parameter_groups()``.
        lr_scheduler: stepped after every optimizer step.
        loss_function: element-wise loss of logits and labels.
        best: the choices so far; saved in checkpoints.
        val_interval: steps between two validations.
        min_positives: positive test rows a class must have to be averaged.
        num_resamples: of the test patients, for the intervals.
        inferer: how a batch goes through the network; MONAI's SimpleInferer by default.
        train_handlers: Ignite handlers.

    Raises:
        ValueError: if two cohorts share a patient; in training, if no class of a task has a positive in
            validation.
        FloatingPointError: in training, if every probe of a kind and task has diverged.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        epoch_length: int,
        train_data_loader: DataLoader[Any],
        val_cohort: DenseCohort,
        test_cohort: DenseCohort,
        network: DenseProbes,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        loss_function: nn.Module,
        best: BestLayers,
        val_interval: int,
        min_positives: int,
        num_resamples: int,
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
        self.probes = network
        self.drawn = cast(DrawnRows, train_data_loader.dataset)
        self.steps = cast(RemainingSteps, train_data_loader.sampler)
        self.val_cohort, self.test_cohort = val_cohort, test_cohort
        _check_patients({"train": self.drawn.cohort, "validation": val_cohort, "test": test_cohort})
        self.lr_scheduler, self.best = lr_scheduler, best
        self.val_interval, self.min_positives = val_interval, min_positives
        self.num_resamples = num_resamples
        self.num_steps = max_epochs * epoch_length
        self.class_names = {task: [label.name for label in load_labels(task)] for task in network.columns}
        self.state.reports = {}
        # before the handlers: a checkpoint of this step must hold the choice, a report what the test gave
        self.add_event_handler(Events.EPOCH_STARTED, self._start_data_at_this_step)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._validate)
        self.add_event_handler(
            Events.ITERATION_COMPLETED(once=self.num_steps) | Events.COMPLETED, self._test_once
        )
        self._register_handlers(list(train_handlers or []))

    # MONAI annotates a dict, but its handlers read the list that decollating makes of it
    def _iteration(  # type: ignore[override]
        self, engine: Engine, batchdata: dict[str, Any]
    ) -> list[dict[str, torch.Tensor]]:
        device = self.state.device
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = batchdata["tokens"].to(device, non_blocking=True)
        logits = self.inferer(tokens, self.network)
        targets = batchdata["targets"].to(device, non_blocking=True).to(logits.dtype)
        elementwise = self.loss_function(logits, targets[:, None].expand_as(logits))
        of_classes = elementwise.mean(2)
        losses = torch.stack([of_classes[..., columns].mean(-1) for columns in self.probes.columns.values()])
        losses.sum().backward()
        self.optimizer.step()
        self.lr_scheduler.step()
        losses = losses.detach()
        return [{"loss": torch.nanmean(torch.where(losses.isfinite(), losses, torch.nan))}]

    def _start_data_at_this_step(self, engine: Engine) -> None:
        """Ignite makes the iterator of the data after this event, and thus after a checkpoint was loaded."""
        self.steps.start_step = self.state.iteration

    def _validate(self, engine: Engine) -> None:
        step = self.state.iteration
        if step % self.val_interval and step != self.num_steps:
            return
        for number, kind in enumerate(TOKEN_KINDS):
            weight, bias = (
                torch.stack([parameter[number].detach() for parameter in parameters])
                for parameters in (self.probes.weights, self.probes.biases)
            )
            values = validation_auprc(self.val_cohort, kind, weight, bias)
            for task, columns in self.probes.columns.items():
                self._offer((kind, task), self._macro(values[:, columns], task), step)

    def _macro(self, values: np.ndarray, task: str) -> np.ndarray:
        """Mean of each row over the classes with positives, which are the same for all probes."""
        organs = [name != BACKGROUND for name in self.class_names[task]]
        known = ~np.isnan(values).all(0) & organs
        return values[:, known].mean(1) if known.any() else np.full(len(values), np.nan)

    def _offer(self, key: tuple[str, str], means: np.ndarray, step: int) -> None:
        kind, task = key
        if np.isnan(means).all():
            present = [
                self.val_cohort.targets(kind, column).any()
                for column, name in enumerate(self.class_names[task], self.probes.columns[task].start)
                if name != BACKGROUND
            ]
            if not any(present):
                raise ValueError(
                    f"validation must have a positive of some class of {task}, got none in "
                    f"{len(self.val_cohort.volumes)} volumes."
                )
            raise FloatingPointError(
                f"scores must be finite, got NaN from every {kind} probe of {task} at step {step}. "
                "Lower learning_rates."
            )
        self.best.offer(key, means, step, self.probes)
        chosen = self.best.chosen[key]
        names = [f"val_macro_auprc/{kind}/{task}/lr_{rate:g}" for rate in self.probes.learning_rates]
        self.state.metrics |= dict(zip(names, means.tolist(), strict=True))
        self.state.metrics[f"val_macro_auprc_best/{kind}/{task}"] = chosen["auprc"]
        logger.info(
            "Step %d: best validation macro AUPRC of %s tokens for %s %.4f, at lr %g and step %d.",
            *(step, kind, task, chosen["auprc"], self.probes.learning_rates[chosen["rate"]], chosen["step"]),
        )

    def _test_once(self, engine: Engine) -> None:
        """After the last step, or when a run resumes that was killed between that and its report."""
        if self.state.iteration < self.num_steps or self.state.reports:
            return
        for kind, task in self.best.chosen:
            report = report_on_test(
                self.test_cohort,
                kind,
                self.probes.columns[task].start,
                self.best.layer((kind, task)).to(self.state.device),  # a checkpoint is read on the CPU
                self.class_names[task],
                lambda name, positives: name != BACKGROUND and positives >= self.min_positives,
                self.num_resamples,
                RESAMPLING_SEED,
            )
            self.state.reports[kind, task] = report
            for metric, (mean, _) in report["macro"].items():
                self.state.metrics[f"test_macro_{metric}/{kind}/{task}"] = mean


def _check_patients(cohorts: dict[str, DenseCohort]) -> None:
    seen: dict[str, str] = {}
    for name, cohort in cohorts.items():
        for patient in cohort.patients:
            if patient in seen:
                raise ValueError(
                    f"cohorts must not share a patient, got '{patient}' in {seen[patient]} and {name}."
                )
            seen[patient] = name
