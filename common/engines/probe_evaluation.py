"""Saved probes on a test set they may never have seen: intervals and paired differences (Table IV)."""

# N volumes, C classes of a probe, K classes of the test set, R resamples

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.cohort.class_map import map_classes
from common.cohort.cohort import load_labels
from common.embeddings.bags import EmbeddingBags, chunks, labelled_volumes
from common.embeddings.store import check_identity
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
    bootstrap,
    groups_of,
    interval,
    macro_means,
    paired_difference,
    resample_weights,
)
from common.metrics.multilabel import multilabel_report
from common.networks.mil_probe import load_probe
from common.networks.poolers import pad_bags
from common.reports.results import add_rows, log_rows, result_rows

logger = logging.getLogger(__name__)

RANKING = ("auroc", "auprc")


class Prediction(NamedTuple):
    """What a probe says of the volumes of a test set.

    Attributes:
        scores: probabilities, float64 ``(N, K)``.
        decisions: whether each class is called positive, bool ``(N, K)``: a merged class has no one
            threshold.
    """

    scores: np.ndarray
    decisions: np.ndarray


class Measured(NamedTuple):
    """The macro metrics of a prediction.

    Attributes:
        values: by metric.
        resampled: by metric, on each resample, ``(R,)``.
    """

    values: dict[str, float]
    resampled: dict[str, np.ndarray]


def predict(probe_dir: str | Path, bags: EmbeddingBags, device: torch.device | str = "cpu") -> Prediction:
    """Apply a saved probe with its own thresholds; its classes are mapped onto those of the test set.

    Args:
        probe_dir: folder of ``probe.safetensors`` and ``probe.json``.
        bags: test set.
        device: where to compute.

    Raises:
        FileNotFoundError: if there is no probe.
        ValueError: if the embeddings are of another encoder than the probe's, or it lacks a class.
    """
    probe, card = load_probe(probe_dir)
    check_identity(
        bags.identity,
        card,
        of="the embeddings",
        source=f"the probe in '{probe_dir}' needs",
        remedy="Embed the volumes as those that the probe was trained on.",
    )
    probe = probe.to(device).eval()
    parts = []
    with torch.no_grad():
        for places in chunks(bags):
            padded, mask = pad_bags([bags[place]["tokens"].to(device) for place in places])
            parts.append(probe(padded, mask).double().sigmoid().cpu())
    thresholds = np.asarray(card["thresholds"], dtype=np.float64)
    scores = torch.cat(parts).numpy()
    return Prediction(*map_classes(scores, thresholds, card["class_names"], bags.class_names))


def measure(prediction: Prediction, bags: EmbeddingBags, weights: np.ndarray) -> Measured:
    """Measure macro AUROC, AUPRC, F1 and balanced accuracy, on the test set and on each resample of it.

    Args:
        prediction: of the test set.
        bags: test set.
        weights: of :func:`common.metrics.bootstrap.resample_weights`.

    Shape:
        ``weights (R, N)``.
    """
    targets, half = bags.labels.numpy(), np.full(len(bags.class_names), 0.5)
    values: dict[str, float] = {}
    resampled: dict[str, np.ndarray] = {}
    # rankings by score; F1 and balanced accuracy by what was called positive, of which 0.5 is the threshold
    for scores, of_ranking in ((prediction.scores, True), (prediction.decisions.astype(np.float64), False)):
        report = multilabel_report(scores, targets, half, bags.class_names)["macro"]
        samples = bootstrap(scores, targets, half, weights)
        for name in report:
            if (name in RANKING) == of_ranking:
                values[name] = report[name]
                resampled[name] = macro_means(samples[name])
    return Measured(values, resampled)


def evaluate_probes(
    probes: Mapping[str, str | None],
    embeddings: Mapping[str, str | None],
    labels_csv: str | Path,
    label_set: str,
    prefix: str,
    dataset: str,
    results_csv: str | Path,
    num_resamples: int,
    tracking_uri: str,
    experiment: str,
    device: torch.device | str = "cpu",
) -> dict[str, Measured]:
    """Test probes on the same volumes, embedded in one way or several, and compare each with the first.

    A row for each metric goes into the results, named by the probe ("frozen"), for embeddings after the first
    also by these ("frozen_transposed"), with its interval over the same resamples of patients for all; and
    the paired difference from the first ("retrained-frozen"). The retrained probe is tested on the first
    embeddings alone.

    Source: DALE-CT IV-B and Table IV; the intervals are ours.

    Args:
        probes: name to folder of the probe.
        embeddings: name to folder of embeddings of the same volumes, the first the right way. A folder of
            either that is None is passed over.
        labels_csv: label table of the test set; may hold further volumes.
        label_set: classes of the test set, a list of ``common.labels``.
        prefix: how names of test volumes start; "" for all.
        dataset: name of the data in the results.
        results_csv: CSV of all evaluations.
        num_resamples: R.
        tracking_uri: MLflow store.
        experiment: MLflow experiment of the run that records the rows.
        device: where to compute.

    Returns:
        Protocol to what was measured.

    Raises:
        FileNotFoundError: if a probe, embeddings or labels are not there.
        ValueError: if no probe is given, no volume has the prefix, embeddings differ in their volumes, or as
            :func:`predict`.
    """
    probe_dirs = {name: folder for name, folder in probes.items() if folder is not None}
    (right, *others) = views = [view for view, folder in embeddings.items() if folder is not None] or [""]
    if not probe_dirs or not right:
        raise ValueError(
            f"probes and embeddings must name at least one each, got {dict(probes)} and {dict(embeddings)}. "
            "Pass --frozen_probe and --test_embeddings_dir."
        )
    names = [label.name for label in load_labels(label_set)]
    bags = {view: _test_bags(str(embeddings[view]), labels_csv, names, prefix) for view in views}
    first = bags[right]
    weights = resample_weights(groups_of(first.volumes, "patients"), num_resamples, RESAMPLING_SEED)
    reference = next(iter(probe_dirs))
    cells = {name: (probe_dir, first) for name, probe_dir in probe_dirs.items()}
    for view in others:
        if bags[view].volumes != first.volumes:
            raise ValueError(
                f"embeddings must be of the same volumes, got {len(first)} in '{right}' and "
                f"{len(bags[view])} in '{view}', or others."
            )
        cells[f"{reference}_{view}"] = probe_dirs[reference], bags[view]
    measured = {}
    for protocol, (probe_dir, own) in cells.items():
        measured[protocol] = measure(predict(probe_dir, own, device), own, weights)
        logger.info("%s: %s", protocol, {key: round(v, 4) for key, v in measured[protocol].values.items()})
    settings = {"label_set": label_set, "prefix": prefix, "num_resamples": num_resamples}
    rows = []
    for protocol, numbers in _numbers(measured).items():
        rows += result_rows(
            numbers,
            encoder=str(first.identity["encoder"]),
            protocol=protocol,
            dataset=dataset,
            n=len(first),
            config=settings | first.identity,
        )
    add_rows(results_csv, rows)
    log_rows(rows, tracking_uri, experiment)
    return measured


def _test_bags(folder: str, labels_csv: str | Path, names: list[str], prefix: str) -> EmbeddingBags:
    volumes = [volume for volume in labelled_volumes(folder, labels_csv) if volume.startswith(prefix)]
    if not volumes:
        raise ValueError(f"prefix must be that of some embedded volume, got '{prefix}' in '{folder}'.")
    return EmbeddingBags(folder, labels_csv, names, volumes)


def _numbers(measured: Mapping[str, Measured]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By protocol and metric; after the protocols themselves how each differs from the first."""
    own = {
        protocol: {
            f"macro_{name}": (value, *interval(of.resampled[name])) for name, value in of.values.items()
        }
        for protocol, of in measured.items()
    }
    (reference, first), *others = measured.items()
    for protocol, of in others:
        differences = {
            name: paired_difference(
                np.append(of.values[name], of.resampled[name]), np.append(value, first.resampled[name])
            )
            for name, value in first.values.items()
        }
        own[f"{protocol}-{reference}"] = {f"macro_{name}": d[:3] for name, d in differences.items()}
    return own
