"""Scores of linear probes on millions of tokens, in memory for a few classes at a time."""

# N rows of a kind of token, M probes' classes, C classes, R resamples

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from common.embeddings.dense_cohort import DenseCohort
from common.metrics.bootstrap import interval, macro_means, resample_weights
from common.metrics.multilabel import auroc_and_average_precision, average_precision
from common.metrics.patient_ranking import rank_by_patient, resampled_areas

SCORE_BYTES = 2**30
"""Memory for scores; our choice. More classes than fit are scored in passes over the tokens."""


def each_column(
    cohort: DenseCohort, kind: str, weight: torch.Tensor, bias: torch.Tensor
) -> Iterator[np.ndarray]:
    """Score all rows and yield the logits of one column after the other.

    Args:
        cohort: whose tokens.
        kind: of token.
        weight: of linear probes, one row a column of scores.
        bias: of the same.

    Shape:
        ``weight (M, D)``, ``bias (M,)``. Yields float32 ``(N,)``.
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


def validation_auprc(cohort: DenseCohort, kind: str, weight: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """Return the AUPRC of every class of every probe.

    Args:
        cohort: validation volumes.
        kind: of token.
        weight: of L probes for all classes of all tasks.
        bias: of the same.

    Shape:
        ``weight (L, C, D)``, ``bias (L, C)``. Output: ``(L, C)``, nan where a class has no positive, and for
        a probe that has diverged.
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
    first_column: int,
    layer: torch.nn.Linear,
    class_names: Sequence[str],
    averaged: Callable[[str, int], bool],
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Measure one probe: every class, and the macro means with intervals over resampled patients.

    Args:
        cohort: test volumes.
        kind: of token.
        first_column: of the task, in the columns of the cohort.
        layer: the probe.
        class_names: of the task.
        averaged: whether a class, by its name and its number of positives, counts in the macro means.
        num_resamples: R.
        seed: of the resamples, which are the same for all probes on the same patients.

    Returns:
        ``per_class[name]``: ``auroc``, ``auprc``, ``positives`` and ``prevalence``; ``macro[metric]``: mean
        over the averaged classes where it is defined, and ``(low, high)``; ``resampled[metric]``: that mean
        on each resample, ``(R,)``; ``left_out``: names of the others.
    """
    weights = resample_weights(cohort.patients, num_resamples, seed)
    patient_of_row = cohort.patient_of_row(kind)
    per_class: dict[str, Any] = {}
    drawn_classes: dict[str, list[Any]] = {"auroc": [], "auprc": []}
    left_out: list[str] = []
    scored = each_column(cohort, kind, layer.weight.detach(), layer.bias.detach())
    for column, (name, scores) in enumerate(zip(class_names, scored, strict=True)):
        target = cohort.targets(kind, first_column + column)
        positives = int(target.sum())
        areas = auroc_and_average_precision(scores[:, None], target[:, None])
        values = {metric: float(area[0]) for metric, area in zip(("auroc", "auprc"), areas, strict=True)}
        per_class[name] = values | {"positives": positives, "prevalence": positives / len(target)}
        if not averaged(name, positives):
            left_out.append(name)
            continue
        ranking = rank_by_patient(scores, target, patient_of_row, len(cohort.patients))
        for metric, drawn in zip(("auroc", "auprc"), resampled_areas(ranking, weights), strict=True):
            drawn_classes[metric].append(drawn)
    counted = [name for name in class_names if name not in left_out]
    resampled = {
        metric: macro_means(np.reshape(drawn, (len(counted), num_resamples)).T)
        for metric, drawn in drawn_classes.items()
    }
    macro = {
        metric: (float(macro_means([per_class[name][metric] for name in counted])), interval(means))
        for metric, means in resampled.items()
    }
    return {"per_class": per_class, "macro": macro, "resampled": resampled, "left_out": left_out}
