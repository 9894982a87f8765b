"""Test saved probes on a test set that may be new to them: intervals and paired differences (Table IV)."""

# N volumes, K classes of the test set, R resamples

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.cohort.class_map import map_classes
from common.cohort.cohort import load_labels
from common.embeddings.bags import BagReader, EmbeddingBags, labelled_volumes
from common.embeddings.store import check_identity
from common.engines.probe_grid import probe_scores
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
from common.reports.results import Numbers, ResultRow, add_rows, log_rows, result_rows

logger = logging.getLogger(__name__)

RANKING = ("auroc", "auprc")


class Prediction(NamedTuple):
    """What a probe says of the volumes of a test set."""

    scores: np.ndarray  # probabilities, float64 (N, K)
    decisions: np.ndarray  # called positive, bool (N, K); a class merged from several has no single threshold


class Measured(NamedTuple):
    """The macro metrics of a prediction."""

    values: dict[str, float]
    resampled: dict[str, np.ndarray]  # on each resample, (R,)

    def numbers(self) -> Numbers:
        """Return the metrics with their intervals, as result rows name them."""
        return {f"macro_{key}": (value, *interval(self.resampled[key])) for key, value in self.values.items()}

    def less(self, other: "Measured") -> Numbers:
        """Return the paired differences from another prediction of the same volumes, with intervals."""
        found = {}
        for key, value in self.values.items():
            pair = ((of.values[key], of.resampled[key]) for of in (self, other))
            found[f"macro_{key}"] = paired_difference(*(np.append(value, drawn) for value, drawn in pair))[:3]
        return found


def predict(probe_dir: str | Path, bags: EmbeddingBags, device: torch.device | str = "cpu") -> Prediction:
    """Apply a saved probe with its thresholds; its classes are mapped onto those of the test set.

    Raises:
        FileNotFoundError: if there is no probe.
        ValueError: if the embeddings are of another encoder than the probe's, or it lacks a class.
    """
    probe, card = load_probe(probe_dir)
    remedy = "Embed the volumes as those that the probe was trained on."
    source = f"the probe in '{probe_dir}' needs"
    check_identity(bags.identity, card, of="the embeddings", source=source, remedy=remedy)
    scores = probe_scores(probe.to(device), BagReader(bags, torch.device(device)))
    thresholds = np.asarray(card["thresholds"], dtype=np.float64)
    return Prediction(*map_classes(scores, thresholds, card["class_names"], bags.class_names))


def measure(prediction: Prediction, bags: EmbeddingBags, weights: np.ndarray) -> Measured:
    """Measure macro AUROC, AUPRC, F1 and balanced accuracy, on the test set and on each resample of it.

    ``weights (R, N)`` come from :func:`common.metrics.bootstrap.resample_weights`.
    """
    targets, half = bags.labels.numpy(), np.full(len(bags.class_names), 0.5)
    measured = Measured({}, {})
    # rankings by score; F1 and balanced accuracy by what was called positive, of which 0.5 is the threshold
    for scores, of_ranking in ((prediction.scores, True), (prediction.decisions.astype(np.float64), False)):
        report = multilabel_report(scores, targets, half, bags.class_names)["macro"]
        samples = bootstrap(scores, targets, half, weights)
        for name in report:
            if (name in RANKING) == of_ranking:
                measured.values[name] = report[name]
                measured.resampled[name] = macro_means(samples[name])
    return measured


def evaluate_probes(
    *,
    probes: Mapping[str, str | None],
    embeddings: Mapping[str, str | None],
    labels_csv: str | Path,
    label_set: str,
    test_prefix: str,
    dataset_name: str,
    results_csv: str | Path,
    num_resamples: int,
    tracking_uri: str,
    experiment: str,
    device: torch.device | str = "cpu",
) -> dict[str, Measured]:
    """Test probes on the same volumes, embedded in one way or several, and compare each with the first.

    ``probes`` and ``embeddings`` map names to folders, the embeddings of the right way first; those that are
    None are passed over. ``test_prefix`` is how names of test volumes start, ``label_set`` a list of
    ``common/labels``.

    A row for each metric goes into the results, named by the probe ("frozen"), for embeddings after the first
    also by these ("frozen_transposed"), with its interval over the same resamples of patients for all; and
    the paired difference from the first ("retrained-frozen"). Only the first probe is tested on further
    embeddings. An MLflow run records the rows.

    Source: DALE-CT IV-B and Table IV; the intervals are ours.

    Returns:
        Protocol to what was measured.

    Raises:
        FileNotFoundError: if a probe, embeddings or labels are not there.
        ValueError: if no probe is given, no volume has the prefix, embeddings differ in their volumes, or as
            :func:`predict`.
    """
    probe_dirs = {name: folder for name, folder in probes.items() if folder is not None}
    folders = {view: folder for view, folder in embeddings.items() if folder is not None}
    if not probe_dirs or not folders:
        raise ValueError(
            f"probes and embeddings must name at least one each, got {dict(probes)} and {dict(embeddings)}. "
            "Pass --frozen_probe and --test_embeddings_dir."
        )
    names = [label.name for label in load_labels(label_set)]
    test_sets = {view: _test_bags(path, labels_csv, names, test_prefix) for view, path in folders.items()}
    cells = _cells(probe_dirs, test_sets)
    (reference, (_, first)), *_ = cells.items()
    weights = resample_weights(groups_of(first.volumes, "patients"), num_resamples, RESAMPLING_SEED)
    measured = {}
    for protocol, (probe_dir, bags) in cells.items():
        measured[protocol] = measure(predict(probe_dir, bags, device), bags, weights)
        logger.info("%s: %s", protocol, {key: round(v, 4) for key, v in measured[protocol].values.items()})
    numbers = {protocol: of.numbers() for protocol, of in measured.items()}
    for protocol, of in measured.items():
        if protocol != reference:
            numbers[f"{protocol}-{reference}"] = of.less(measured[reference])
    settings = {"label_set": label_set, "prefix": test_prefix, "num_resamples": num_resamples}
    rows = rows_of(numbers, first, dataset_name, settings)
    add_rows(results_csv, rows)
    log_rows(rows, tracking_uri, experiment)
    return measured


def _test_bags(folder: str, labels_csv: str | Path, names: list[str], prefix: str) -> EmbeddingBags:
    volumes = [volume for volume in labelled_volumes(folder, labels_csv) if volume.startswith(prefix)]
    if not volumes:
        raise ValueError(f"No volume in '{folder}' has a name that starts with test_prefix '{prefix}'.")
    return EmbeddingBags(folder, labels_csv, names, volumes=volumes)


def _cells(
    probe_dirs: Mapping[str, str], test_sets: Mapping[str, EmbeddingBags]
) -> dict[str, tuple[str, EmbeddingBags]]:
    """Pair probes and test sets: each probe with the first, and the first probe with each; by protocol."""
    (right, first), *others = test_sets.items()
    cells = {name: (probe_dir, first) for name, probe_dir in probe_dirs.items()}
    reference = next(iter(probe_dirs))
    for view, bags in others:
        if bags.volumes != first.volumes:
            raise ValueError(
                f"embeddings must be of the same volumes, got {len(first)} in '{right}' and {len(bags)} in "
                f"'{view}', or others."
            )
        cells[f"{reference}_{view}"] = probe_dirs[reference], bags
    return cells


def rows_of(
    numbers: Mapping[str, Numbers], bags: EmbeddingBags, dataset_name: str, settings: dict[str, Any]
) -> list[ResultRow]:
    """Make the result rows of a test set from the numbers of each protocol.

    ``settings`` are what the numbers depend on besides the embeddings.
    """
    rows = []
    for protocol, of_protocol in numbers.items():
        rows += result_rows(
            of_protocol,
            encoder=str(bags.identity["encoder"]),
            protocol=protocol,
            dataset=dataset_name,
            n=len(bags),
            config=settings | bags.identity,
        )
    return rows
