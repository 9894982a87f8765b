"""Train linear probes of CLS and patch tokens in one pass, choose on validation, test once."""

# L learning rates, K = 2 kinds of tokens, B rows of a batch, D embedding, C classes,
# N rows of a kind of token, M probes' classes, R resamples

import logging
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from common.cohort.cohort import load_labels
from common.embeddings.bags import check_disjoint
from common.embeddings.dense_cohort import TOKEN_KINDS, DenseCohort, DrawnRows, RowBatch
from common.engines.probe_grid import ProbeTrainer
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
    interval,
    macro_means,
    resample_weights,
    resampled_areas,
)
from common.metrics.multilabel import auroc_and_average_precision, average_precision
from common.networks.dense_probe import DenseProbes

logger = logging.getLogger(__name__)

BACKGROUND = "background"
"""Trained on and listed, but in no macro mean: it is no organ, and nearly every slice shows some."""

SCORE_BYTES = 2**30
"""Memory for scores; our choice. More classes than fit are scored in several passes over the tokens."""

MAX_LEVELS = 4096
"""Distinct scores of positives that resamples tell apart; our choice: the areas are off by less than 1e-3."""

Key = tuple[str, str]
"""Kind of token and task."""


class ChosenLayer(TypedDict):
    """A linear probe with its weights when it was chosen."""

    auprc: float  # validation macro AUPRC
    rate: int  # place among the learning rates
    step: int  # optimizer steps taken
    weight: torch.Tensor
    bias: torch.Tensor


class ClassScores(TypedDict):
    """What is measured of one class on all test tokens."""

    auroc: float
    auprc: float
    positives: int
    prevalence: float


class DenseResults(TypedDict):
    """One linear probe on the test set; the metrics are "auroc" and "auprc"."""

    per_class: dict[str, ClassScores]
    macro: dict[str, tuple[float, tuple[float, float]]]  # mean of the averaged classes, 95 % interval
    resampled: dict[str, NDArray[np.float64]]  # that mean on each resample of the patients, (R,)
    left_out: list[str]  # classes that do not count in the means


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
    ``engine.state.reports`` then holds what :meth:`report_on_test` returns, by
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
        train_data_loader: DataLoader[Any],
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
            values = validation_auprc(self.val_cohort, kind, *self.probes.raw(number))
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
            report = self.report_on_test(kind, task, self.num_resamples)
            self.state.reports[kind, task] = report
            for metric, (mean, _) in report["macro"].items():
                self.state.metrics[f"test_macro_{metric}/{kind}/{task}"] = mean

    def report_on_test(self, kind: str, task: str, num_resamples: int) -> DenseResults:
        """Measure a chosen probe: every class, and the macro means with intervals over resampled patients."""
        cohort, first_column = self.test_cohort, self.probes.columns[task].start
        layer = self.best.layer((kind, task)).to(self.state.device)  # a checkpoint is read on the CPU
        # float64, for a resample may hold more than 2 ** 24 tokens
        weights = resample_weights(cohort.patients, num_resamples, RESAMPLING_SEED).astype(np.float64)
        patient_of_row = cohort.patient_of_row(kind)
        per_class: dict[str, ClassScores] = {}
        drawn: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        counted: list[str] = []
        scored = each_column(cohort, kind, layer.weight.detach(), layer.bias.detach())
        for column, (name, scores) in enumerate(zip(self.class_names[task], scored, strict=True)):
            target = cohort.targets(kind, first_column + column)
            positives = int(target.sum())
            auroc, auprc = auroc_and_average_precision(scores[:, None], target[:, None])
            per_class[name] = {
                "auroc": float(auroc[0]),
                "auprc": float(auprc[0]),
                "positives": positives,
                "prevalence": positives / len(target),
            }
            if name != BACKGROUND and positives >= self.min_positives:
                counted.append(name)
                drawn.append(resampled_areas(scores, target, patient_of_row, weights, MAX_LEVELS))
        of_metric = np.reshape(drawn, (len(counted), 2, num_resamples))
        resampled = {"auroc": macro_means(of_metric[:, 0].T), "auprc": macro_means(of_metric[:, 1].T)}
        values = np.reshape([(per_class[n]["auroc"], per_class[n]["auprc"]) for n in counted], (-1, 2))
        return {
            "per_class": per_class,
            "macro": {
                metric: (float(macro_means(of_classes)), interval(resampled[metric]))
                for metric, of_classes in zip(resampled, values.T, strict=True)
            },
            "resampled": resampled,
            "left_out": [name for name in self.class_names[task] if name not in counted],
        }


def each_column(
    cohort: DenseCohort, kind: str, weight: torch.Tensor, bias: torch.Tensor
) -> Iterator[NDArray[np.float32]]:
    """Score all rows of a kind of token by linear probes, ``weight (M, D)`` and ``bias (M,)``.

    Yields the logits column by column, float32 ``(N,)``.
    """
    num_rows = cohort.num_rows[kind]
    per_pass = max(1, SCORE_BYTES // (4 * num_rows))
    for first in range(0, len(weight), per_pass):
        block, offset = weight[first : first + per_pass].float(), bias[first : first + per_pass].float()
        scores = np.empty((len(block), num_rows), np.float32)
        done = 0
        for tokens in cohort.tokens(kind):
            logits = torch.addmm(offset[:, None], block, tokens.to(block).mT)
            scores[:, done : done + len(tokens)] = logits.cpu().numpy()
            done += len(tokens)
        yield from scores


def validation_auprc(
    cohort: DenseCohort, kind: str, weight: torch.Tensor, bias: torch.Tensor
) -> NDArray[np.float64]:
    """Return the AUPRC of every class of every probe, given ``weight (L, C, D)`` and ``bias (L, C)``.

    Output ``(L, C)``, nan where a class has no positive, and for a probe that has diverged.
    """
    rates, classes = bias.shape
    # class by class, so that the targets of one serve all learning rates
    columns = each_column(cohort, kind, weight.transpose(0, 1).flatten(0, 1), bias.transpose(0, 1).flatten())
    values = np.full((rates, classes), np.nan)
    for column in range(classes):
        target = cohort.targets(kind, column)
        for rate in range(rates):
            scores = next(columns)
            if target.any() and np.isfinite(scores).all():
                values[rate, column] = average_precision(scores[:, None], target[:, None])[0]
    return values
