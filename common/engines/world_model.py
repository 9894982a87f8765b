"""What slice embeddings know about where in the body a slice lies: the world-model probes."""

# S slices, D embedding, R resamples

from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.cohort.cohort import load_labels, patient_of
from common.embeddings.bags import EmbeddingBags
from common.embeddings.dense_labels import read_dense_labels
from common.embeddings.store import EmbeddingStore, check_identity
from common.metrics.bootstrap import bootstrap, groups_of, interval, macro_means, resample_weights
from common.metrics.linear_readout import moments, r_squared, read_out, ridge
from common.metrics.multilabel import auroc_and_average_precision, macro
from common.metrics.organ_span import SHARES_OF_PEAK, longest_run, predicted_span, span_score
from common.metrics.paired_samples import Mean, mean_over_volumes
from common.metrics.slice_paths import (
    agreement,
    gap_curve,
    order_by_nearest_neighbours,
    order_by_principal_axis,
)
from common.metrics.spread import jackknife, participation_ratio, spectral_effective_rank
from common.networks.mil_probe import load_probe

FloatArray = NDArray[np.float64]
Split = Mapping[str, Sequence[str]]

JACKKNIFE_GROUPS = 20
"""Groups of patients left out one by one; our choice."""

MIN_SHARE = 1e-4
"""Share of a slice from which an organ is in it. Source: DALE-CT's released organ-span probe."""

MIN_SCANS = 5
"""Test scans that must show an organ for it to be scored. Our choice; upstream: 40 of 86."""

ORGANS: Mapping[str, tuple[str, ...]] = {
    "heart": ("heart",),
    "lung_left": ("lung_upper_lobe_left", "lung_lower_lobe_left"),
    "lung_right": ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
    "liver": ("liver",),
    "spleen": ("spleen",),
    "stomach": ("stomach",),
    "kidney_left": ("kidney_left",),
    "kidney_right": ("kidney_right",),
    "esophagus": ("esophagus",),
    "trachea": ("trachea",),
    "aorta": ("aorta",),
    "sternum": ("sternum",),
}
"""Structures whose spans are read, as names of ``common/labels/totalsegmentator.csv``.

Source: the structures of DALE-CT's released organ-span probe, which reads others under their names.
"""


class Slices(NamedTuple):
    """One volume: ``tokens (S, D)`` float64 and ``z_mm (S,)`` from 0 at the first slice."""

    volume: str
    tokens: FloatArray
    z_mm: FloatArray


def slices_of(store: EmbeddingStore, volumes: Sequence[str]) -> Iterator[Slices]:
    """Read slice embeddings volume by volume.

    Raises:
        ValueError: if the store has no positions of slices.
    """
    for volume in volumes:
        embedding = store.read(volume)
        if embedding.z_mm is None:
            raise ValueError(f"The embedding of '{volume}' has no slice positions (z_mm). Embed it again.")
        z_mm = embedding.z_mm.double().numpy()
        yield Slices(volume, embedding.tokens.double().numpy(), z_mm - z_mm[0])


def positions(z_mm: FloatArray) -> FloatArray:
    """Return the position probe's two targets: fraction of the scan, and mm from its middle, ``(S, 2)``."""
    return np.stack([z_mm / z_mm[-1], z_mm - z_mm[-1] / 2], axis=1)


def z_position(store: EmbeddingStore, split: Split, num_resamples: int, seed: int) -> dict[str, Any]:
    """Read each slice's place along the scan by ridge regression; the penalty is chosen on validation.

    Source: DALE-CT's released world-model probes (fraction only).

    Args:
        store: slice embeddings.
        split: volumes of ``train``, ``validation`` and ``test``, disjoint in patients.
        num_resamples: resamples of the test patients.
        seed: seed of the resamples.

    Returns:
        ``r2_fraction``, ``r2_mm``, ``mae_fraction`` and ``mae_mm`` as :class:`Mean`, and ``predicted_mm`` and
        ``true_mm`` of all test slices.
    """
    of_train = (moments(v.tokens, positions(v.z_mm)) for v in slices_of(store, split["train"]))
    fits = ridge(reduce(add, of_train))
    errors = np.zeros(len(fits))
    for volume in slices_of(store, split["validation"]):
        residual = read_out(fits, volume.tokens)[..., 0] - positions(volume.z_mm)[:, 0]
        errors += (residual**2).sum(1)
    fit, names = fits[int(errors.argmin())], list(split["test"])
    predicted, true = [], []
    for volume in slices_of(store, names):
        predicted.append(read_out(fit, volume.tokens))
        true.append(positions(volume.z_mm))
    weights = resample_weights([patient_of(name) for name in names], num_resamples, seed)
    found: dict[str, Any] = {}
    for place, unit in enumerate(("fraction", "mm")):
        maes, sums = [], []
        for one, other in zip(predicted, true, strict=True):
            error, target = np.abs(one - other)[:, place], other[:, place]
            maes.append(float(error.mean()))
            sums.append((len(target), (error**2).sum(), target.sum(), (target**2).sum()))
        found[f"mae_{unit}"] = mean_over_volumes(maes, names, num_resamples, seed)
        count, squared, total, squares = (weights @ np.array(sums)).T
        low, high = interval(1 - squared / (squares - total**2 / count))
        value = float(r_squared(np.concatenate(predicted), np.concatenate(true))[place])
        found[f"r2_{unit}"] = Mean(value, float("nan"), low, high, len(names))
    found["predicted_mm"], found["true_mm"] = (np.concatenate(part)[:, 1] for part in (predicted, true))
    return found


def label_free(
    store: EmbeddingStore, volumes: Sequence[str], gaps_mm: Sequence[float], num_resamples: int, seed: int
) -> dict[str, Any]:
    """Measure order, distance by gap, and the directions in use, none of which needs a label.

    Returns:
        ``tau_principal_axis`` and ``tau_nearest_neighbours``: mean |Kendall's tau|; ``effective_rank`` and
        ``participation_ratio`` of all slices; ``gap_curve``: one per gap; all as :class:`Mean`.
    """
    groups = {patient: index for index, patient in enumerate(sorted(set(map(patient_of, volumes))))}
    num_groups = min(JACKKNIFE_GROUPS, len(groups))
    sums: dict[int, FloatArray] = {}
    taus: dict[str, list[float]] = {"principal_axis": [], "nearest_neighbours": []}
    curves = []
    for volume in slices_of(store, volumes):
        taus["principal_axis"].append(agreement(order_by_principal_axis(volume.tokens)))
        taus["nearest_neighbours"].append(agreement(order_by_nearest_neighbours(volume.tokens)))
        curves.append(gap_curve(volume.tokens, volume.z_mm, gaps_mm))
        group = groups[patient_of(volume.volume)] % num_groups
        features = moments(volume.tokens, np.zeros((len(volume.tokens), 1))).features
        sums[group] = sums.get(group, np.zeros_like(features)) + features
    mean = partial(mean_over_volumes, volumes=volumes, num_resamples=num_resamples, seed=seed)
    found: dict[str, Any] = {f"tau_{name}": mean(values) for name, values in taus.items()}
    measures = {"effective_rank": spectral_effective_rank, "participation_ratio": participation_ratio}
    for name, measure in measures.items():
        found[name] = Mean(*jackknife(list(sums.values()), measure), len(volumes))
    found["gap_curve"] = [mean(values) for values in np.array(curves).T]
    return found


def organ_spans(
    store: EmbeddingStore, split: Split, labels_dir: str | Path, num_resamples: int, seed: int
) -> dict[str, dict[str, Mean]]:
    """Read where organs begin and end: ridge from CLS to their shares, cut at a share of the curve's maximum.

    Penalty and cut are those with the best mean IoU over validation scans and organs; ``labels_dir`` holds
    labels from ``python -m data_prep dense-labels``.

    Source: DALE-CT's released organ-span probe.

    Raises:
        ValueError: if no validation scan shows an organ.

    Returns:
        Organ that at least ``MIN_SCANS`` test scans show, and "mean" of these, to ``iou``, ``boundary_mm``
        and ``miss_rate`` (no slice predicted) as :class:`Mean`.
    """
    train = slices_of(store, split["train"])
    fits = ridge(reduce(add, (moments(v.tokens, _shares(labels_dir, v.volume)) for v in train)))
    ious = np.array(
        [
            [
                [_scan_scores(curves, true, volume.z_mm, cut)[:, 0] for cut in SHARES_OF_PEAK]
                for curves in predicted
            ]
            for volume, predicted, true in _predicted(store, split["validation"], labels_dir, fits)
        ]
    )  # fmt: skip
    means = macro_means(ious.transpose(1, 2, 0, 3).reshape(*ious.shape[1:3], -1))
    if np.isnan(means).all():
        raise ValueError(f"None of the {len(ious)} validation volumes shows one of {list(ORGANS)}.")
    penalty, cut = np.unravel_index(int(means.argmax()), means.shape)
    names = list(split["test"])
    scores = np.array(
        [
            _scan_scores(predicted[0], true, volume.z_mm, SHARES_OF_PEAK[cut])
            for volume, predicted, true in _predicted(store, names, labels_dir, fits[penalty : penalty + 1])
        ]
    )
    is_scored = (~np.isnan(scores[..., 0])).sum(0) >= MIN_SCANS
    rows = {organ: scores[:, place] for place, organ in enumerate(ORGANS) if is_scored[place]}
    if rows:
        rows["mean"] = macro_means(scores[:, is_scored].swapaxes(1, 2))
    mean = partial(mean_over_volumes, volumes=names, num_resamples=num_resamples, seed=seed)
    columns = ("iou", "boundary_mm", "miss_rate")
    return {organ: dict(zip(columns, map(mean, of_organ.T), strict=True)) for organ, of_organ in rows.items()}


def _shares(labels_dir: str | Path, volume: str) -> FloatArray:
    """Share of every slice that each of ``ORGANS`` covers, ``(S, len(ORGANS))``."""
    shares, _ = read_dense_labels(Path(labels_dir) / f"{volume}.safetensors").of_slices()
    index = {label.name: label.index for label in load_labels("totalsegmentator")}
    return np.stack(
        [shares[:, [index[name] for name in names]].sum(1) for names in ORGANS.values()], axis=1
    ).astype(np.float64)


def _predicted(
    store: EmbeddingStore, volumes: Sequence[str], labels_dir: str | Path, fits: FloatArray
) -> Iterator[tuple[Slices, FloatArray, FloatArray]]:
    """Yield each volume with predicted curves ``(fits, S, organs)`` and true ones ``(S, organs)``."""
    for volume in slices_of(store, volumes):
        yield volume, read_out(fits, volume.tokens), _shares(labels_dir, volume.volume)


def _scan_scores(predicted: FloatArray, true: FloatArray, z_mm: FloatArray, cut: float) -> FloatArray:
    """IoU, boundary error and whether it was missed, per organ; nan for those that the scan lacks."""
    scores = np.full((true.shape[1], 3), np.nan)
    for organ in range(true.shape[1]):
        span = longest_run(true[:, organ] > MIN_SHARE)
        if span is not None:
            guess = predicted_span(predicted[:, organ], cut)
            scores[organ] = (*span_score(guess, span, z_mm), float(guess is None))
    return scores


def stride_scores(
    store: EmbeddingStore,
    probe_dir: str | Path,
    labels_csv: str | Path,
    strides: Sequence[int],
    num_resamples: int,
    seed: int,
) -> dict[int, dict[str, Mean]]:
    """Test a MIL probe on every k-th slice of each volume.

    Source: DALE-CT's released stride probe: k of 1, 2, 4 and 8, probes of Table V.

    Args:
        store: slice embeddings.
        probe_dir: folder of an evaluation of the same encoder.
        labels_csv: labels of the probe's classes.
        strides: every how many slices.
        num_resamples: resamples of patients.
        seed: seed of the resamples.

    Returns:
        Stride to ``macro_auroc`` and ``macro_auprc``.

    Raises:
        ValueError: if the probe is of other embeddings, or a stride is not positive.
    """
    probe, card = load_probe(probe_dir)
    remedy = "Train a probe on these embeddings."
    source = f"the probe in '{probe_dir}' needs"
    check_identity(store.identity, card, of="the embeddings", source=source, remedy=remedy)
    if min(strides) < 1:
        raise ValueError(f"strides must be positive, got {list(strides)}.")
    bags = EmbeddingBags(store.folder, labels_csv, card["class_names"])
    weights = resample_weights(groups_of(bags.volumes, "patients"), num_resamples, seed)
    return {stride: _macro_scores(_stride_logits(probe, bags, stride), bags, weights) for stride in strides}


@torch.no_grad()
def _stride_logits(probe: torch.nn.Module, bags: EmbeddingBags, stride: int) -> FloatArray:
    """Return ``(N, C)``."""
    logits = []
    for index in range(len(bags)):
        tokens = bags[index]["tokens"][None, ::stride]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        logits.append(probe(tokens, mask)[0].double().numpy())
    return np.stack(logits)


def _macro_scores(logits: FloatArray, bags: EmbeddingBags, weights: NDArray[np.float32]) -> dict[str, Mean]:
    targets = bags.labels.numpy()
    samples = bootstrap(logits, targets, np.zeros(targets.shape[1]), weights)
    found = {}
    for name, of_class in zip(("auroc", "auprc"), auroc_and_average_precision(logits, targets), strict=True):
        value, _ = macro(of_class, bags.class_names)
        ends = interval(macro_means(samples[name]))
        found[f"macro_{name}"] = Mean(value, float("nan"), *ends, len(bags))
    return found
