"""A tested probe as tables for CSV files: its classes, thresholds and seeds. Undefined is "nan"."""

# N volumes, C classes

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cohort.predictions import Predictions
from common.metrics.bootstrap import IntervalReport
from common.metrics.calibration import brier_score, expected_calibration_error, reliability
from common.metrics.multilabel import MultilabelReport, balanced_accuracy, f1
from common.run.atomic_file import atomic_file

METRICS = ("auroc", "auprc", "f1", "balanced_accuracy")


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same columns as a CSV that appears only when whole.

    Args:
        path: file to write or replace; its folder must exist.
        rows: at least one.
    """
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def class_rows(
    reports: Mapping[str, MultilabelReport], intervals: Mapping[str, IntervalReport], test: Predictions
) -> list[dict[str, Any]]:
    """Return one row per class: its metrics with intervals, its calibration, and how often it occurs.

    Args:
        reports: ``engine.state.reports``.
        intervals: ``engine.state.intervals``.
        test: predictions on the test set.
    """
    brier, rows = brier_score(test.probabilities, test.labels), []
    for index, (name, values) in enumerate(reports["probe"]["per_class"].items()):
        ends = intervals["probe"]["per_class"][name]
        numbers = {metric: values[metric] for metric in METRICS}
        numbers |= {
            f"{metric}_{end}": ends[metric][place]
            for metric in METRICS
            for place, end in enumerate(("low", "high"))
        }
        bins = reliability(test.probabilities[:, index], test.labels[:, index])
        numbers["auprc_of_prevalence"] = reports["prevalence"]["per_class"][name]["auprc"]
        numbers |= {"brier": brier[index], "calibration_error": expected_calibration_error(bins)}
        numbers["threshold"] = test.thresholds[index]
        rows.append(
            {"class": name, **{column: f"{number:.6f}" for column, number in numbers.items()}}
            | {"positives": int(test.labels[:, index].sum()), "volumes": len(test.volumes)}
        )
    return rows


def threshold_rows(validation: Predictions, test: Predictions) -> list[dict[str, Any]]:
    """Return what each threshold does on the volumes it was chosen on and on the test set, one row per class.

    Args:
        validation: predictions on the validation set.
        test: predictions on the test set, of the same classes.
    """
    rows = []
    for index, name in enumerate(test.class_names):
        row = {"class": name, "threshold": repr(float(test.thresholds[index]))}
        for cohort, of_cohort in (("validation", validation), ("test", test)):
            scores, targets = of_cohort.probabilities[:, [index]], of_cohort.labels[:, [index]]
            threshold = of_cohort.thresholds[[index]]
            called, positive = scores[:, 0] >= threshold, targets[:, 0] == 1
            shares = {
                "f1": float(f1(scores, targets, threshold)[0]),
                "balanced_accuracy": float(balanced_accuracy(scores, targets, threshold)[0]),
                "sensitivity": _mean(called[positive]),
                "specificity": _mean(~called[~positive]),
                "positive_predictive_value": _mean(positive[called]),
                "negative_predictive_value": _mean(~positive[~called]),
            }
            row |= {f"{cohort}_{metric}": f"{value:.6f}" for metric, value in shares.items()}
            row |= {f"{cohort}_positives": str(positive.sum()), f"{cohort}_called": str(called.sum())}
        rows.append(row)
    return rows


def seed_rows(seeds: Sequence[int], reports: Sequence[MultilabelReport]) -> list[dict[str, Any]]:
    """Return one row per seed with the macro metrics of the chosen probe.

    Args:
        seeds: the run's own first.
        reports: ``engine.state.seed_reports``.
    """
    return [
        {"seed": seed, **{f"macro_{metric}": f"{report['macro'][metric]:.6f}" for metric in METRICS}}
        for seed, report in zip(seeds, reports, strict=True)
    ]


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else float("nan")
