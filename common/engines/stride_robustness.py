"""A probe's scores when it sees every k-th slice only."""

# N volumes, S slices, C classes

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.cohort.patient_split import natural_order, patient_of
from common.embeddings.bags import EmbeddingBags
from common.embeddings.part import IDENTITY_KEYS
from common.embeddings.store import EmbeddingStore
from common.metrics.bootstrap import interval, macro_means, resample_weights
from common.metrics.multilabel import auroc, average_precision, macro
from common.metrics.paired_samples import Mean
from common.metrics.patient_ranking import rank_by_patient, resampled_areas
from common.networks.mil_probe import load_probe


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
        store: of slice embeddings.
        probe_dir: of an evaluation, for the same encoder.
        labels_csv: labels of the probe's classes.
        strides: k.
        num_resamples: resamples of patients.
        seed: of the resamples.

    Returns:
        Stride to ``macro_auroc`` and ``macro_auprc``.

    Raises:
        ValueError: if the probe is of other embeddings, or a stride is not positive.
    """
    probe, card = load_probe(probe_dir)
    for name in (*IDENTITY_KEYS, "dim"):
        if card[name] != store.identity[name]:
            raise ValueError(
                f"probe must be of {name} '{store.identity[name]}' as the embeddings, got '{card[name]}' in "
                f"'{probe_dir}'."
            )
    if min(strides) < 1:
        raise ValueError(f"strides must be positive, got {list(strides)}.")
    bags = EmbeddingBags(store.folder, labels_csv, card["class_names"])
    of_volume = [patient_of(volume) for volume in bags.volumes]
    patients = sorted(set(of_volume), key=natural_order)
    weights = resample_weights(patients, num_resamples, seed)
    place = np.array([patients.index(patient) for patient in of_volume])
    return {stride: _scores(_logits(probe, bags, stride), bags, place, weights) for stride in strides}


@torch.no_grad()
def _logits(probe: torch.nn.Module, bags: EmbeddingBags, stride: int) -> np.ndarray:
    """Return ``(N, C)``."""
    logits = []
    for index in range(len(bags)):
        tokens = bags[index]["tokens"][None, ::stride]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        logits.append(probe(tokens, mask)[0].double().numpy())
    return np.stack(logits)


def _scores(
    logits: np.ndarray, bags: EmbeddingBags, place: np.ndarray, weights: np.ndarray
) -> dict[str, Mean]:
    targets = bags.labels.numpy().astype(int)
    areas = [
        resampled_areas(rank_by_patient(logits[:, c], targets[:, c], place, weights.shape[1]), weights)
        for c in range(targets.shape[1])
    ]
    found = {}
    for which, (name, metric) in enumerate((("macro_auroc", auroc), ("macro_auprc", average_precision))):
        value, undefined = macro(metric(logits, targets), bags.class_names)
        counted = [
            of_class[which] for of_class, c in zip(areas, bags.class_names, strict=True) if c not in undefined
        ]
        low, high = interval(macro_means(np.reshape(counted, (len(counted), len(weights))).T))
        found[name] = Mean(value, float("nan"), low, high, len(bags))
    return found
