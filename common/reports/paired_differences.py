"""Differences between encoders that were tested on the same volumes, with intervals and p.

They are between probes as they were trained: what another seed of training would have given is not in the
intervals. The p values are not corrected for the number of comparisons.
"""

# R resamples, N volumes, C classes

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from common.cohort.cohort import write_table
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
    bootstrap,
    groups_of,
    macro_means,
    paired_difference,
    resample_weights,
)
from common.metrics.multilabel import METRICS, multilabel_report
from common.reports.results import MACRO_COLUMNS, Predictions, read_predictions

MACRO = "macro"
PREDICTIONS, RESAMPLES = "test_predictions.csv", "resamples.npz"
MEASURES = tuple(
    f"{kind} {task} {metric}"
    for kind in ("cls", "patch")
    for task in ("rexgroundingct", "totalsegmentator")
    for metric in ("auroc", "auprc")
)
HINT = "Evaluate both with the same labels, split, min_positives and num_resamples."

Difference = dict[str, Any]
Samples = dict[tuple[str, ...], NDArray[np.float64]]
"""What was measured, such as a class and a metric, to its value and those on the resamples ``(1 + R,)``."""


def compare(
    reference: Path, others: Sequence[Path], *, num_resamples: int, resampling: str, out: Path | None = None
) -> list[Difference]:
    """Compare evaluations by MIL probes or by dense probes with the first one.

    Args:
        reference: folder of the evaluation to compare with, or its ``test_predictions.csv``.
        others: folders or files of the others; the reference among them is ignored.
        num_resamples: R, for MIL probes; dense probes bring their own.
        resampling: "patients" or "volumes", for MIL probes.
        out: CSV to write, with every class.

    Raises:
        FileNotFoundError: if an evaluation is not there.
        ValueError: if there is nothing to compare, or evaluations do not fit each other.
    """
    others = [path for path in others if path.resolve() != reference.resolve()]
    if not others:
        raise ValueError(f"Nothing to compare with '{reference}'. Name another evaluation.")
    if (reference / RESAMPLES).is_file():
        rows = dense_differences(reference, others)
    else:
        paths = [path / PREDICTIONS if path.is_dir() else path for path in (reference, *others)]
        first, *further = _distinct(paths)
        rows = paired_differences(first, further, num_resamples, resampling)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_table(out, [{k: f"{v:.6f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows])
    return rows


def paired_differences(
    reference: Predictions, others: Sequence[Predictions], num_resamples: int, resampling: str
) -> list[Difference]:
    """Compare predictions on the same volumes, on the same bootstrap resamples.

    Returns:
        One row for each of the others, ``macro`` and each class, and each metric: ``encoder``, ``reference``,
        ``class``, ``metric``, the two values, their ``difference`` (encoder less reference) with its 95 %
        interval ``low`` and ``high``, and ``p``.

    Raises:
        ValueError: if the predictions are of other volumes, classes or labels than the reference's.
    """
    weights = resample_weights(groups_of(reference.volumes, resampling), num_resamples, RESAMPLING_SEED)
    theirs, rows = _measured(reference, weights), []
    for other in others:
        ours = _measured(_aligned(other, reference), weights)
        rows += _compared(other.encoder, reference.encoder, ("class", "metric"), ours, theirs)
    return rows


def dense_differences(reference: str | Path, others: Sequence[str | Path]) -> list[Difference]:
    """Compare macro means of linear probes on the same test volumes, by folders of ``eval_dense_2d``.

    Returns:
        Rows as of :func:`paired_differences`, with ``measure`` in place of ``class`` and ``metric``.

    Raises:
        FileNotFoundError: if a folder holds no ``resamples.npz``.
        ValueError: if two evaluations are of other volumes, average other classes or resample otherwise.
    """
    first, rows = _read_resamples(reference), []
    theirs: Samples = {(measure,): first[measure] for measure in MEASURES}
    for folder in others:
        other = _read_resamples(folder)
        for name in sorted(first.keys() - {"encoder", *MEASURES}):
            if other.get(name, np.array(None)).tolist() != first[name].tolist():
                raise ValueError(f"'{folder}' and '{reference}' have different {name}. {HINT}")
        sizes = len(other[MEASURES[0]]) - 1, len(first[MEASURES[0]]) - 1
        if sizes[0] != sizes[1]:
            raise ValueError(f"'{folder}' has {sizes[0]} resamples and '{reference}' has {sizes[1]}. {HINT}")
        ours: Samples = {(measure,): other[measure] for measure in MEASURES}
        rows += _compared(str(other["encoder"]), str(first["encoder"]), ("measure",), ours, theirs)
    return rows


def _compared(
    encoder: str, reference: str, columns: Sequence[str], ours: Samples, theirs: Samples
) -> list[Difference]:
    return [
        {"encoder": encoder, "reference": reference}
        | dict(zip(columns, what, strict=True))
        | {"value": float(values[0]), "reference_value": float(theirs[what][0])}
        | paired_difference(values, theirs[what])._asdict()
        for what, values in ours.items()
    ]


def _measured(predictions: Predictions, weights: NDArray[np.float32]) -> Samples:
    """Measure macro means and each class, on all volumes and on each resample."""
    scored = (predictions.probabilities, predictions.labels, predictions.thresholds)
    report, samples = multilabel_report(*scored, predictions.class_names), bootstrap(*scored, weights)
    found: Samples = {(MACRO, m): np.append(report["macro"][m], macro_means(samples[m])) for m in METRICS}
    for index, name in enumerate(predictions.class_names):
        values = report["per_class"][name]
        found |= {(name, m): np.append(values[m], samples[m][:, index]) for m in METRICS}
    return found


def _aligned(other: Predictions, reference: Predictions) -> Predictions:
    """Put the volumes in the order of the reference's."""
    pair = f"'{reference.encoder}' and '{other.encoder}'"
    if other.class_names != reference.class_names:
        raise ValueError(
            f"{pair} were tested on different classes: {reference.class_names} and {other.class_names}."
        )
    on_one_side = sorted(set(other.volumes) ^ set(reference.volumes))
    if on_one_side:
        raise ValueError(
            f"{pair} were tested on different volumes, {len(reference.volumes)} and {len(other.volumes)}: "
            f"'{on_one_side[0]}' is in only one of them."
        )
    place = {volume: index for index, volume in enumerate(other.volumes)}
    order = [place[volume] for volume in reference.volumes]
    labels = other.labels[order]
    if not np.array_equal(labels, reference.labels):
        volume = reference.volumes[int((labels != reference.labels).any(1).argmax())]
        raise ValueError(f"{pair} have different labels for volume '{volume}'.")
    return other._replace(volumes=reference.volumes, probabilities=other.probabilities[order], labels=labels)


def _distinct(paths: Sequence[Path]) -> list[Predictions]:
    """Read predictions; several of one encoder, as for preprocessings, are named after their folders."""
    found = [read_predictions(path) for path in paths]
    names = [predictions.encoder for predictions in found]
    return [
        each._replace(encoder=path.parent.name) if names.count(each.encoder) > 1 else each
        for path, each in zip(paths, found, strict=True)
    ]


def _read_resamples(folder: str | Path) -> dict[str, NDArray[Any]]:
    path = Path(folder) / RESAMPLES
    if not path.is_file():
        raise FileNotFoundError(f"No {RESAMPLES} in '{folder}'. Run eval_dense_2d with this --output_dir.")
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def differences_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out the differences of macro means, one row per encoder and metric."""
    table = Table(title="Paired differences of macro means, 95 % intervals", box=box.SIMPLE)
    for head in ("encoder", "less", "metric"):
        table.add_column(head, no_wrap=True)
    for head in ("difference", "interval", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row.get("class", MACRO) == MACRO:
            name = row["measure"] if "measure" in row else MACRO_COLUMNS[f"macro_{row['metric']}"]
            ends = f"{row['low']:+.4f} to {row['high']:+.4f}"
            numbers = (f"{row['difference']:+.4f}", ends, f"{row['p']:.4f}")
            table.add_row(row["encoder"], row["reference"], name, *numbers)
    return table
