"""Differences between encoders that were tested on the same volumes, with intervals and p.

``python -m common.handlers.paired_differences dale_ct_0/test_predictions.csv */test_predictions.csv``
compares each further file with the first one.
"""

# R resamples, N volumes, C classes

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import box
from rich.table import Table

from common.cohort.predictions import Predictions, read_predictions
from common.handlers.probe_tables import METRICS, write_table
from common.handlers.results_table import COLUMNS, print_whole
from common.metrics.bootstrap import (
    RESAMPLING_SEED,
    bootstrap,
    groups_of,
    interval,
    macro_means,
    resample_weights,
    two_sided_p,
)
from common.metrics.multilabel import multilabel_report
from common.run.short_errors import short_errors

MACRO = "macro"


def paired_differences(
    reference: Predictions,
    others: Sequence[Predictions],
    num_resamples: int = 2000,
    resampling: str = "patients",
) -> list[dict[str, Any]]:
    """Compare predictions on the same volumes, on the same bootstrap resamples.

    The differences are between probes as they were trained: what another seed of training would have given is
    not in the intervals. The p values are not corrected for the number of comparisons.

    Args:
        reference: what the others are compared with.
        others: predictions of the same volumes and classes, with the same labels.
        num_resamples: R; our choice: 2,000, as in the evaluation.
        resampling: "patients" or "volumes".

    Returns:
        One row for each of the others, ``macro`` and each class, and each metric: ``encoder``, ``reference``,
        ``class``, ``metric``, the two values, their ``difference`` (encoder less reference) with its 95 %
        interval ``low`` and ``high``, and ``p``.

    Raises:
        ValueError: if the predictions are of other volumes, classes or labels than the reference's.
    """
    weights = resample_weights(groups_of(reference.volumes, resampling), num_resamples, RESAMPLING_SEED)
    of_reference = _values(reference, weights)
    rows = []
    for other in others:
        of_other = _values(_aligned(other, reference), weights)
        for name, metric in of_other:
            value, samples = of_other[name, metric]
            reference_value, reference_samples = of_reference[name, metric]
            differences = samples - reference_samples
            low, high = interval(differences)
            rows.append(
                {
                    "encoder": other.encoder,
                    "reference": reference.encoder,
                    "class": name,
                    "metric": metric,
                    "value": value,
                    "reference_value": reference_value,
                    "difference": value - reference_value,
                    "low": low,
                    "high": high,
                    "p": two_sided_p(differences),
                }
            )
    return rows


def _values(predictions: Predictions, weights: np.ndarray) -> dict[tuple[str, str], tuple[float, np.ndarray]]:
    """By class (and macro) and metric: the value on all volumes and on each resample."""
    scored = (predictions.probabilities, predictions.labels, predictions.thresholds)
    report, samples = multilabel_report(*scored, predictions.class_names), bootstrap(*scored, weights)
    values = {(MACRO, metric): (report[MACRO][metric], macro_means(samples[metric])) for metric in METRICS}
    for index, name in enumerate(predictions.class_names):
        of_class = report["per_class"][name]
        values |= {(name, metric): (of_class[metric], samples[metric][:, index]) for metric in METRICS}
    return values


def _aligned(other: Predictions, reference: Predictions) -> Predictions:
    """Put the volumes in the order of the reference's."""
    if other.class_names != reference.class_names:
        raise ValueError(
            f"predictions must have the same classes in one order, got {reference.class_names} for "
            f"'{reference.encoder}' and {other.class_names} for '{other.encoder}'."
        )
    on_one_side = sorted(set(other.volumes) ^ set(reference.volumes))
    if on_one_side:
        raise ValueError(
            f"predictions must be of the same volumes, got {len(reference.volumes)} for "
            f"'{reference.encoder}' and {len(other.volumes)} for '{other.encoder}', first on one side only: "
            f"'{on_one_side[0]}'."
        )
    place = {volume: index for index, volume in enumerate(other.volumes)}
    order = [place[volume] for volume in reference.volumes]
    labels = other.labels[order]
    if not np.array_equal(labels, reference.labels):
        volume = reference.volumes[int((labels != reference.labels).any(1).argmax())]
        raise ValueError(f"predictions must have the same labels, got others for volume '{volume}'.")
    return other._replace(volumes=reference.volumes, probabilities=other.probabilities[order], labels=labels)


def _distinct(paths: Sequence[Path]) -> list[Predictions]:
    """Read predictions; those of one encoder, as of several preprocessings, are called as their folders."""
    found = [read_predictions(path) for path in paths]
    names = [predictions.encoder for predictions in found]
    if len(set(names)) == len(names):
        return found
    return [
        predictions._replace(
            encoder=path.parent.name if names.count(predictions.encoder) > 1 else predictions.encoder
        )
        for path, predictions in zip(paths, found, strict=True)
    ]


def differences_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Lay out the macro differences, one row an encoder and metric.

    Args:
        rows: of :func:`paired_differences`.
    """
    macro = [row for row in rows if row["class"] == MACRO]
    return lay_out_differences(macro, "metric", [COLUMNS[f"macro_{row['metric']}"] for row in macro])


def lay_out_differences(rows: Sequence[dict[str, Any]], column: str, names: Sequence[str]) -> Table:
    """Lay out differences with their intervals.

    Args:
        rows: with ``encoder``, ``reference``, ``difference``, ``low``, ``high`` and ``p``.
        column: head of the column that says what differs.
        names: what differs, of each row.
    """
    table = Table(title="Paired differences of macro means, 95 % intervals", box=box.SIMPLE)
    for head in ("encoder", "less", column):
        table.add_column(head, no_wrap=True)
    for head in ("difference", "interval", "p"):
        table.add_column(head, justify="right", no_wrap=True)
    for row, name in zip(rows, names, strict=True):
        ends = f"{row['low']:+.4f} to {row['high']:+.4f}"
        cells = (f"{row['difference']:+.4f}", ends, f"{row['p']:.4f}")
        table.add_row(row["encoder"], row["reference"], name, *cells)
    return table


def write_differences(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows as a CSV, numbers with six digits; its folder is made.

    Args:
        path: file to write or replace.
        rows: at least one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, [{k: f"{v:.6f}" if isinstance(v, float) else v for k, v in r.items()} for r in rows])


def main(
    reference: Annotated[Path, typer.Argument(help="test_predictions.csv of the encoder to compare with.")],
    others: Annotated[list[Path], typer.Argument(help="Those of the other encoders.")],
    num_resamples: Annotated[int, typer.Option(help="Bootstrap resamples.")] = 2000,
    resampling: Annotated[str, typer.Option(help="What a resample draws: patients or volumes.")] = "patients",
    out: Annotated[Path | None, typer.Option(help="CSV to write, with every class.")] = None,
) -> None:
    """Compare encoders on the same test volumes, on the same bootstrap resamples."""
    short_errors()
    first, *further = _distinct(
        [reference, *(path for path in others if path.resolve() != reference.resolve())]
    )
    rows = paired_differences(first, further, num_resamples, resampling)
    if out is not None:
        write_differences(out, rows)
    print_whole(differences_table(rows))


if __name__ == "__main__":
    typer.run(main)
