"""Score linear probes on millions of tokens, a few classes at a time to bound memory."""

# N rows of a kind of token, M probes' classes, C classes, R resamples

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from common.embeddings.dense_cohort import DenseCohort
from common.metrics.bootstrap import interval, macro_means, resample_weights, resampled_areas
from common.metrics.multilabel import auroc_and_average_precision, average_precision

SCORE_BYTES = 2**30
"""Memory for scores; our choice. More classes than fit are scored in several passes over the tokens."""

MAX_LEVELS = 4096
"""Distinct scores of positives that resamples tell apart; our choice: the areas are off by less than 1e-3."""


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


def report_on_test(
    cohort: DenseCohort,
    kind: str,
    *,
    first_column: int,
    layer: torch.nn.Linear,
    class_names: Sequence[str],
    averaged: Callable[[str, int], bool],
    num_resamples: int,
    seed: int,
) -> DenseResults:
    """Measure one probe: every class, and the macro means with intervals over resampled patients.

    Args:
        cohort: test volumes.
        kind: kind of token.
        first_column: the task's first column among those of the cohort.
        layer: the probe.
        class_names: classes of the task.
        averaged: whether a class, by its name and number of positives, counts in the macro means.
        num_resamples: number of resamples, R.
        seed: seed of the resamples, which are the same for all probes on the same patients.
    """
    # float64, for a resample may hold more than 2 ** 24 tokens
    weights = resample_weights(cohort.patients, num_resamples, seed).astype(np.float64)
    patient_of_row = cohort.patient_of_row(kind)
    per_class: dict[str, ClassScores] = {}
    drawn: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    counted: list[str] = []
    scored = each_column(cohort, kind, layer.weight.detach(), layer.bias.detach())
    for column, (name, scores) in enumerate(zip(class_names, scored, strict=True)):
        target = cohort.targets(kind, first_column + column)
        positives = int(target.sum())
        auroc, auprc = auroc_and_average_precision(scores[:, None], target[:, None])
        per_class[name] = {
            "auroc": float(auroc[0]),
            "auprc": float(auprc[0]),
            "positives": positives,
            "prevalence": positives / len(target),
        }
        if averaged(name, positives):
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
        "left_out": [name for name in class_names if name not in counted],
    }
