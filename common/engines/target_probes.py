"""Read targets of one's own from frozen embeddings: labels and numbers by ridge, survival by Cox.

All see the same features, mean, maximum and deviation over the tokens of a volume, standardized over the
training volumes; their penalty is the best on validation patients; the test volumes are used once.
"""

# N volumes, S tokens of a volume, D embedding, F = 3 D features, R resamples

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from common.cohort.cohort import split_by_patient, write_table
from common.cohort.targets import BINARY, NUMBER, SURVIVAL, Target, read_targets
from common.embeddings.bags import check_disjoint, open_embeddings
from common.embeddings.store import check_identity
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
    groups_of,
    interval,
    paired_difference,
    resample_weights,
    resampled_areas,
)
from common.metrics.linear_readout import moments, read_out, ridge
from common.metrics.numbers import number_metrics
from common.metrics.survival import concordance, cox, partial_log_likelihood
from common.reports.results import ResultRow, add_rows, log_rows, result_rows
from common.reports.target_pictures import TargetResult, draw_target

logger = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]

RIDGE_PENALTIES = tuple(float(value) for value in np.logspace(-3, 4, 15))
"""Tried for labels and numbers, relative to the features' mean variance. Our choice."""
COX_PENALTIES = tuple(float(value) for value in np.logspace(-2, 3, 11))
"""Tried for survival, on standardized features. Our choice."""
CONSTANT, LENGTH = "constant", "num_tokens"
"""Floors: the same prediction for all; and what the number of a volume's tokens (slices) tells."""
PROTOCOL = "targets"


class Cohort(NamedTuple):
    """The volumes that have one target.

    Args:
        volumes: N names.
        features: ``(N, F)``.
        truth: ``(N, 1)``; of survival times and events ``(N, 2)``.
    """

    volumes: list[str]
    features: FloatArray
    truth: FloatArray


def pooled_features(folder: str | Path, encoder: str | None) -> tuple[dict[str, FloatArray], dict[str, Any]]:
    """Pool each volume of a folder: mean, maximum and deviation of its tokens, and last their number.

    Returns:
        Volume to ``(F + 1,)``; and the identity of the embeddings.
    """
    store = open_embeddings(folder, encoder)
    pooled = {}
    for volume in tqdm(store.volumes, desc=f"Pooling {Path(folder).name}", unit="volume", leave=False):
        tokens = store.view(volume).double()
        parts = (tokens.mean(0), tokens.amax(0), tokens.std(0, correction=0), torch.tensor([len(tokens)]))
        pooled[volume] = torch.cat(parts).numpy()
    return pooled, store.identity


def evaluate_targets(
    *,
    targets_csv: str | Path,
    targets: Mapping[str, str | Sequence[str]],
    train_embeddings_dir: str | Path,
    test_embeddings_dir: str | Path,
    encoder: str | None,
    num_val_patients: int,
    split_seed: int,
    num_resamples: int,
    resampling: str,
    dataset_name: str,
    output_dir: str | Path,
    results_csv: str | Path,
    tracking_uri: str,
    experiment: str,
) -> list[TargetResult]:
    """Fit and test every target, beside two floors, with intervals over the same resamples of patients.

    Rows of the results, protocol "targets": ``auroc/<name>`` and ``auprc/<name>`` of labels; ``r2/``,
    ``mae/`` and ``spearman/`` of numbers; ``c_index/`` of survival; of the encoder, of the floors "constant"
    and "num_tokens", and the paired difference of the encoder from the latter. ``output_dir`` receives
    ``predictions.csv`` and a picture for each target.

    Args:
        targets_csv: table of targets, see :func:`common.cohort.targets.read_targets`.
        targets: which, and of what kind.
        train_embeddings_dir: embeddings of volumes to fit and to choose the penalty on.
        test_embeddings_dir: embeddings of other patients.
        encoder: name that the embeddings must state; None for any.
        num_val_patients: training patients that the penalty is chosen on.
        split_seed: seed of their draw.
        num_resamples: resamples of the test volumes.
        resampling: "patients" or "volumes".
        dataset_name: name of the data in the results.
        output_dir: folder to write.
        results_csv: CSV of all evaluations.
        tracking_uri: MLflow store.
        experiment: MLflow experiment.

    Raises:
        FileNotFoundError: if table or embeddings are not there.
        ValueError: as :func:`read_targets`; if the embeddings differ in origin, a patient is in training and
            test, or a target is constant, has no event, or no volume, on one side.
    """
    wanted = read_targets(targets_csv, targets)
    sides: dict[str, dict[str, FloatArray]] = {}
    sides["train"], identity = pooled_features(train_embeddings_dir, encoder)
    sides["test"], of_test = pooled_features(test_embeddings_dir, encoder)
    remedy = "Embed all volumes with one encoder."
    known = {name: value for name, value in identity.items() if name != "dtype"}
    check_identity(of_test, known, of="the test embeddings", source="in train", remedy=remedy)
    check_disjoint({side: groups_of([*pooled], resampling) for side, pooled in sides.items()}, resampling)
    split = split_by_patient([*sides["train"]], num_val_patients, split_seed)
    sides["validation"] = {volume: sides["train"].pop(volume) for volume in split["validation"]}
    cohorts = [{side: _cohort(target, pooled, side) for side, pooled in sides.items()} for target in wanted]
    name = str(identity["encoder"])
    tested, rows = [], []
    for target, of_target in zip(wanted, cohorts, strict=True):
        groups = groups_of(of_target["test"].volumes, resampling)
        weights = resample_weights(groups, num_resamples, RESAMPLING_SEED)
        tested.append(probe_target(target, of_target, name, weights))
        settings = {"targets": dict(targets), **identity}
        settings |= {"num_val_patients": num_val_patients, "split_seed": split_seed}
        settings |= {"num_resamples": num_resamples, "resampling": resampling}
        rows += _rows(tested[-1], name, dataset_name, settings)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_table(output_dir / "predictions.csv", [line for found in tested for line in _lines(found)])
    for found in tested:
        draw_target(output_dir / f"{found.target.name}.png", found, name)
    add_rows(results_csv, rows)
    log_rows([row for row in rows if row.encoder == name], tracking_uri, experiment)
    return tested


def probe_target(
    target: Target, cohorts: Mapping[str, Cohort], encoder: str, weights: NDArray[np.float32]
) -> TargetResult:
    """Fit one target on "train", choose on "validation", test on "test", from embeddings and as floors."""
    test = cohorts["test"]
    every = np.concatenate([np.ones((1, len(test.volumes)), np.float32), weights])
    predicted, trained = {}, np.empty(0)
    for name, columns in ((encoder, slice(-1)), (LENGTH, slice(-1, None))):
        inputs = _standardized({side: cohort.features[:, columns] for side, cohort in cohorts.items()})
        fit = (_fit_cox if target.kind == SURVIVAL else _fit_ridge)(inputs, cohorts, target.kind)
        predicted[name] = fit["test"]
        trained = fit["train"] if name == encoder else trained
    mean = cohorts["train"].truth[:, 0].mean() if target.kind == NUMBER else 0.0
    predicted[CONSTANT] = np.full(len(test.volumes), mean)
    metrics = {name: _metrics(target.kind, scores, test.truth, every) for name, scores in predicted.items()}
    return TargetResult(target, test.volumes, test.truth, predicted, trained, metrics)


def _cohort(target: Target, pooled: Mapping[str, FloatArray], side: str) -> Cohort:
    """Bring features and target of one side together; refuse what cannot be learned or measured."""
    volumes = [volume for volume in pooled if volume in target.values]
    if len(volumes) < len(pooled):
        logger.warning(
            "%d of %d embedded %s volumes have no '%s' and are left out.",
            *(len(pooled) - len(volumes), len(pooled), side, target.name),
        )
    if not volumes:
        raise ValueError(f"'{target.name}' must be known of a {side} volume, got none of {len(pooled)}.")
    truth = np.array([target.values[volume] for volume in volumes], np.float64)
    if target.kind == SURVIVAL:
        if not truth[:, 1].any():
            raise ValueError(
                f"'{target.name}' must have an event among the {side} volumes, got {len(truth)} that are all "
                "censored."
            )
    elif (truth == truth[0]).all():
        raise ValueError(
            f"'{target.name}' must vary among the {side} volumes, got {truth[0, 0]:g} for all {len(truth)}."
        )
    return Cohort(volumes, np.stack([pooled[volume] for volume in volumes]), truth)


def _standardized(features: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Give each feature mean 0 and deviation 1 over the training volumes; one that is constant becomes 0."""
    mean, deviation = features["train"].mean(0), features["train"].std(0)
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    return {side: (values - mean) * scale for side, values in features.items()}


def _fit_ridge(
    inputs: Mapping[str, FloatArray], cohorts: Mapping[str, Cohort], kind: str
) -> dict[str, FloatArray]:
    """Return what the penalty with the best validation AUROC, or least squared error, predicts."""
    fits = ridge(moments(inputs["train"], cohorts["train"].truth), RIDGE_PENALTIES)
    guesses, truth = read_out(fits, inputs["validation"])[..., 0], cohorts["validation"].truth[:, 0]
    ones = np.ones((1, len(truth)))
    quality = [
        float(resampled_areas(guess, truth, np.arange(len(truth)), ones)[0][0])
        if kind == BINARY
        else -float(((guess - truth) ** 2).mean())
        for guess in guesses
    ]
    best = fits[int(np.argmax(quality))]
    return {side: read_out(best, values)[:, 0] for side, values in inputs.items()}


def _fit_cox(
    inputs: Mapping[str, FloatArray], cohorts: Mapping[str, Cohort], _: str
) -> dict[str, FloatArray]:
    """Return the log hazards of the penalty with the highest partial likelihood on validation."""
    times, events = cohorts["train"].truth.T
    fits = [cox(inputs["train"], times, events, penalty) for penalty in COX_PENALTIES]
    truth = cohorts["validation"].truth.T
    quality = [partial_log_likelihood(inputs["validation"] @ fit, *truth)[0] for fit in fits]
    best = fits[int(np.argmax(quality))]
    return {side: values @ best for side, values in inputs.items()}


def _metrics(
    kind: str, scores: FloatArray, truth: FloatArray, weights: NDArray[np.float32]
) -> dict[str, FloatArray]:
    if kind == SURVIVAL:
        return {"c_index": concordance(scores, truth[:, 0], truth[:, 1], weights)}
    if kind == NUMBER:
        return number_metrics(scores, truth[:, 0], weights)
    areas = resampled_areas(scores, truth[:, 0], np.arange(len(scores)), weights)
    return dict(zip(("auroc", "auprc"), areas, strict=True))


def _rows(tested: TargetResult, encoder: str, dataset: str, settings: Mapping[str, Any]) -> list[ResultRow]:
    facts: dict[str, Any] = {"protocol": PROTOCOL, "dataset": dataset, "n": len(tested.volumes)}
    facts["config"] = settings
    name, rows = tested.target.name, []
    for subject, metrics in tested.metrics.items():
        numbers = {f"{key}/{name}": (float(of[0]), *interval(of[1:])) for key, of in metrics.items()}
        rows += result_rows(numbers, encoder=subject, **facts)
    floor = tested.metrics[LENGTH]
    differences = {
        f"{key}/{name}": paired_difference(of, floor[key])[:3] for key, of in tested.metrics[encoder].items()
    }
    return rows + result_rows(differences, encoder=f"{encoder} - {LENGTH}", **facts)


def _lines(tested: TargetResult) -> list[dict[str, Any]]:
    """Rows of the table of predictions."""
    guesses = [tested.predicted[name].tolist() for name in tested.predicted if name != CONSTANT]
    return [
        {"target": tested.target.name, "volume": volume, "truth": truth[0], "event": [*truth[1:], ""][0]}
        | {"predicted": guess, LENGTH: floor}
        for volume, truth, guess, floor in zip(tested.volumes, tested.truth.tolist(), *guesses, strict=True)
    ]
