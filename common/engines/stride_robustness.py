"""How well a probe does when it sees only every k-th slice."""

# N volumes, S slices, C classes

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.embeddings.bags import EmbeddingBags
from common.embeddings.store import EmbeddingStore, check_identity
from common.metrics.bootstrap import bootstrap, groups_of, interval, macro_means, resample_weights
from common.metrics.multilabel import auroc_and_average_precision, macro
from common.metrics.paired_samples import Mean
from common.networks.mil_probe import load_probe

FloatArray = NDArray[np.float64]


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
    return {stride: _scores(_logits(probe, bags, stride), bags, weights) for stride in strides}


@torch.no_grad()
def _logits(probe: torch.nn.Module, bags: EmbeddingBags, stride: int) -> FloatArray:
    """Return ``(N, C)``."""
    logits = []
    for index in range(len(bags)):
        tokens = bags[index]["tokens"][None, ::stride]
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        logits.append(probe(tokens, mask)[0].double().numpy())
    return np.stack(logits)


def _scores(logits: FloatArray, bags: EmbeddingBags, weights: NDArray[np.float32]) -> dict[str, Mean]:
    targets = bags.labels.numpy()
    samples = bootstrap(logits, targets, np.zeros(targets.shape[1]), weights)
    found = {}
    for name, of_class in zip(("auroc", "auprc"), auroc_and_average_precision(logits, targets), strict=True):
        value, _ = macro(of_class, bags.class_names)
        ends = interval(macro_means(samples[name]))
        found[f"macro_{name}"] = Mean(value, float("nan"), *ends, len(bags))
    return found
