"""Train linear probes of CLS and patch tokens in one pass, choose on validation, test once."""

# L learning rates, K = 2 kinds of tokens, B rows of a batch, D embedding, C classes

import logging
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from common.cohort.cohort import load_labels
from common.embeddings.bags import check_disjoint
from common.embeddings.dense_cohort import TOKEN_KINDS, DenseCohort, DrawnRows, RowBatch
from common.engines.dense_scores import report_on_test, validation_auprc
from common.engines.probe_grid import ProbeTrainer
from common.metrics.bootstrap import RESAMPLING_SEED
from common.networks.dense_probe import DenseProbes

logger = logging.getLogger(__name__)

BACKGROUND = "background"
"""Trained on and listed, but in no macro mean: it is no organ, and nearly every slice shows some."""

Key = tuple[str, str]
"""Kind of token and task."""


class ChosenLayer(TypedDict):
    """A linear probe with its weights when it was chosen."""

    auprc: float  # validation macro AUPRC
    rate: int  # place among the learning rates
    step: int  # optimizer steps taken
    weight: torch.Tensor
    bias: torch.Tensor


class BestLayers:
    """Keeps the learning rate and step with the highest validation macro AUPRC, for each kind and task.

    Ties keep the earlier step, and within a step the learning rate that is named first.
    """

    def __init__(self) -> None:
        self.chosen: dict[Key, ChosenLayer] = {}

    def offer(self, key: Key, auprc: NDArray[np.float64], step: int, network: DenseProbes) -> None:
        """Keep the best learning rate of this validation if it beats the best so far.

        ``auprc (L,)`` is the macro AUPRC, nan for a probe that diverged; the weights are copied.
        """
        rate = int(np.nanargmax(auprc))
        if key in self.chosen and auprc[rate] <= self.chosen[key]["auprc"]:
            return
        weights = network.layer(TOKEN_KINDS.index(key[0]), rate, network.columns[key[1]]).state_dict()
        self.chosen[key] = {
            "auprc": float(auprc[rate]),
            "rate": rate,
            "step": step,
            "weight": weights["weight"],
            "bias": weights["bias"],
        }

    def layer(self, key: Key) -> nn.Linear:
        """Return a chosen probe with the weights it had when it was chosen."""
        weight, bias = self.chosen[key]["weight"], self.chosen[key]["bias"]
        layer = nn.Linear(weight.shape[1], len(weight)).to(weight)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def state_dict(self) -> dict[str, ChosenLayer]:
        """Return tensors and plain numbers only."""
        return {"/".join(key): value for key, value in self.chosen.items()}

    def load_state_dict(self, state: dict[str, ChosenLayer]) -> None:
        """Restore what :meth:`state_dict` returned."""
        pairs = {key: key.partition("/") for key in state}
        self.chosen = {(kind, task): state[key] for key, (kind, _, task) in pairs.items()}


class DenseProbeTrainer(ProbeTrainer):
    """Train every probe on its kind of token; validate, choose and test for each kind and task.

    Each probe's loss is the mean binary cross-entropy over the rows and classes of a batch. Every
    ``val_interval`` steps and after the last, macro AUPRC is measured on ``val_cohort`` for every probe, a
    class counting as present where its share is above 0; the best learning rate and step of each kind and
    task are kept and, after the last step, tested once on ``test_cohort``.

    Macro means of validation are over the classes with a positive there, those of the test over the classes
    with ``min_positives``; the background is in neither.

    ``engine.state.metrics`` holds ``val_macro_auprc/<kind>/<task>/lr_<lr>`` and
    ``val_macro_auprc_best/<kind>/<task>``; after the test ``test_macro_<metric>/<kind>/<task>``.
    ``engine.state.reports`` then holds what :func:`common.engines.dense_scores.report_on_test` returns, by
    (kind, task).

    Source: DALE-CT IV-A3 and its released code.

    Args:
        train_data_loader: batches of ``DrawnRows`` in the order of ``RemainingSteps``.
        network: the probes.
        val_cohort: volumes to choose on.
        test_cohort: volumes to test on.
        best: the choices so far; saved in checkpoints.
        min_positives: positive test rows a class must have to be averaged.
        num_resamples: resamples of the test patients, for the intervals.
        others: as :class:`common.engines.probe_grid.ProbeTrainer`.

    Raises:
        ValueError: if two cohorts share a patient; in training, if no class of a task has a positive in
            validation.
        FloatingPointError: in training, if every probe of a kind and task has diverged.
    """

    def __init__(
        self,
        *,
        train_data_loader: DataLoader,
        network: DenseProbes,
        val_cohort: DenseCohort,
        test_cohort: DenseCohort,
        best: BestLayers,
        min_positives: int,
        num_resamples: int,
        **others: Any,  # noqa: ANN401 (the trainer's)
    ) -> None:
        self.probes, self.best = network, best
        self.drawn = cast(DrawnRows, train_data_loader.dataset)
        self.val_cohort, self.test_cohort = val_cohort, test_cohort
        cohorts = {"train": self.drawn.cohort, "validation": val_cohort, "test": test_cohort}
        check_disjoint({name: cohort.patients for name, cohort in cohorts.items()}, "patients")
        self.min_positives, self.num_resamples = min_positives, num_resamples
        self.class_names = {task: [label.name for label in load_labels(task)] for task in network.columns}
        super().__init__(
            train_data_loader=train_data_loader, network=network, sampler=train_data_loader.sampler, **others
        )

    def losses(self, batch: RowBatch) -> torch.Tensor:
        """Return the mean loss of each probe, ``(tasks, K, L)``."""
        device = self.state.device
        logits = self.inferer(batch["tokens"].to(device, non_blocking=True), self.network)
        targets = batch["targets"].to(device, non_blocking=True).to(logits.dtype)
        of_classes = self.loss_function(logits, targets[:, None].expand_as(logits)).mean(2)
        return torch.stack([of_classes[..., columns].mean(-1) for columns in self.probes.columns.values()])

    def validate(self, step: int) -> None:
        """Measure macro AUPRC of all probes and keep the best for each kind and task."""
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

    def _offer(self, key: Key, means: np.ndarray, step: int) -> None:
        kind, task = key
        if np.isnan(means).all():
            present = [
                self.val_cohort.targets(kind, column).any()
                for column, name in enumerate(self.class_names[task], self.probes.columns[task].start)
                if name != BACKGROUND
            ]
            if not any(present):
                raise ValueError(
                    f"None of the {len(self.val_cohort.volumes)} validation volumes is positive of any class "
                    f"of {task}."
                )
            raise FloatingPointError(
                f"Every {kind} probe of {task} gives NaN or Inf at step {step}. Lower learning_rates."
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

    def test(self) -> None:
        """Test the chosen probe of each kind and task."""
        for kind, task in self.best.chosen:
            report = report_on_test(
                self.test_cohort,
                kind,
                first_column=self.probes.columns[task].start,
                layer=self.best.layer((kind, task)).to(self.state.device),  # a checkpoint is read on the CPU
                class_names=self.class_names[task],
                averaged=lambda name, positives: name != BACKGROUND and positives >= self.min_positives,
                num_resamples=self.num_resamples,
                seed=RESAMPLING_SEED,
            )
            self.state.reports[kind, task] = report
            for metric, (mean, _) in report["macro"].items():
                self.state.metrics[f"test_macro_{metric}/{kind}/{task}"] = mean
