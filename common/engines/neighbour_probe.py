"""Predict labels from a volume's nearest neighbours: kNN and retrieval on averaged slices, without training.

``python -m common.engines.neighbour_probe --help``. Distances are cosine.
"""

# N volumes, D embedding, C classes

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from common.cohort.cohort import load_labels, read_labels, split_by_patient
from common.embeddings.bags import EmbeddingBags, check_cohorts, labelled_volumes
from common.engines.probe_evaluation import Measured, Prediction, measure, rows_of
from common.metrics.bootstrap import RESAMPLING_SEED, groups_of, resample_weights
from common.metrics.multilabel import f1_thresholds, macro
from common.metrics.neighbours import WEIGHTS, Neighbours, cosine_neighbours, knn_scores, retrieval_report
from common.reports.results import NAN, add_rows, log_rows, print_whole, results_table
from common.run.config import short_errors


def average_embeddings(bags: EmbeddingBags) -> NDArray[np.float32]:
    """Average the slices of each volume, ``(N, D)``."""
    return torch.stack([bags[index]["tokens"].float().mean(0) for index in range(len(bags))]).numpy()


def knn_measured(
    cohorts: dict[str, EmbeddingBags], ks: list[int], weights: NDArray[np.float32]
) -> dict[str, Measured]:
    """Measure kNN for every k and weighting, with the thresholds of the best F1 on validation.

    Neighbours are searched in "train"; ``weights`` are resamples of "test". Returns protocol, such as
    "knn_5_majority", to what was measured on the test set.
    """
    bank, labels = average_embeddings(cohorts["train"]), cohorts["train"].labels.numpy()
    nearest = {
        side: cosine_neighbours(average_embeddings(cohorts[side]), bank, max(ks))
        for side in ("validation", "test")
    }
    measured = {}
    for k in ks:
        first = {
            side: Neighbours(found.places[:, :k], found.distances[:, :k]) for side, found in nearest.items()
        }
        for weighting in WEIGHTS:
            scores = {side: knn_scores(found, labels, weighting) for side, found in first.items()}
            thresholds = f1_thresholds(scores["validation"], cohorts["validation"].labels.numpy())
            prediction = Prediction(scores["test"], scores["test"] >= thresholds)
            measured[f"knn_{k}_{weighting}"] = measure(prediction, cohorts["test"], weights)
    return measured


def retrieval_values(cohorts: dict[str, EmbeddingBags], ks: list[int]) -> dict[str, float]:
    """Measure retrieval of training volumes by test volumes, by class and as means over the classes.

    Returns metric, such as "macro_recall_at_5" and "recall_at_5/Emphysema", to value; nan where undefined.
    """
    bank, test = cohorts["train"], cohorts["test"]
    nearest = cosine_neighbours(average_embeddings(test), average_embeddings(bank), max(ks))
    report = retrieval_report(
        nearest,
        query_labels=test.labels.numpy(),
        bank_labels=bank.labels.numpy(),
        names=test.class_names,
        ks=ks,
    )
    names = list(report)
    values = {}
    for metric in report[names[0]]:
        by_class = [report[name][metric] for name in names]
        values[f"macro_{metric}"] = macro(by_class, names)[0]
        values |= {f"{metric}/{name}": value for name, value in zip(names, by_class, strict=True)}
    return values


def main(
    train_embeddings: Annotated[Path, typer.Option(help="Embeddings of the volumes to search in.")],
    train_labels: Annotated[Path, typer.Option(help="Their label table: VolumeName and the classes.")],
    test_embeddings: Annotated[Path, typer.Option(help="Embeddings of the test volumes.")],
    test_labels: Annotated[Path, typer.Option(help="Their label table.")],
    k: Annotated[
        list[int] | None, typer.Option(help="Neighbours; may be repeated. [default: 1, 5, 20]")
    ] = None,
    label_set: Annotated[str, typer.Option(help="Classes: a list of common/labels.")] = "ct_rate",
    dataset: Annotated[str, typer.Option(help="Name of the data in the results.")] = "ct_rate",
    num_val_patients: Annotated[
        int, typer.Option(help="Training patients kept to set thresholds on.")
    ] = 1000,
    split_seed: Annotated[int, typer.Option(help="Seed of their draw.")] = 42,
    num_resamples: Annotated[int, typer.Option(help="Bootstrap resamples of patients.")] = 2000,
    results_csv: Annotated[Path, typer.Option(help="CSV of all evaluations.")] = Path(
        "results/neighbours.csv"
    ),
    tracking_uri: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store.")
    ] = "sqlite:///mlflow.db",
) -> None:
    """Predict labels from the nearest training volumes (cosine of averaged slices), and measure retrieval."""
    short_errors()
    ks = sorted(set(k or [1, 5, 20]))
    names = [label.name for label in load_labels(label_set)]
    sides = split_by_patient(list(read_labels(train_labels, [])), num_val_patients, split_seed)
    embedded = set(labelled_volumes(train_embeddings, train_labels))
    cohorts = {
        side: EmbeddingBags(
            train_embeddings, train_labels, names, volumes=[name for name in volumes if name in embedded]
        )
        for side, volumes in sides.items()
    }
    test = cohorts["test"] = EmbeddingBags(test_embeddings, test_labels, names)
    check_cohorts(cohorts, "patients")
    weights = resample_weights(groups_of(test.volumes, "patients"), num_resamples, RESAMPLING_SEED)
    measured = knn_measured(cohorts, ks, weights)
    numbers = {protocol: of_protocol.numbers() for protocol, of_protocol in measured.items()}
    retrieval = retrieval_values(cohorts, ks)
    numbers["retrieval"] = {metric: (value, NAN, NAN) for metric, value in retrieval.items()}
    settings = {"ks": ks, "num_val_patients": num_val_patients, "split_seed": split_seed}
    rows = rows_of(numbers, test, dataset, settings)
    add_rows(results_csv, rows)
    log_rows(rows, tracking_uri, "neighbours")
    print_whole(results_table([row for row in rows if row.protocol != "retrieval"]))
    for metric, value in retrieval.items():
        if metric.startswith("macro_"):
            Console().print(f"{metric.removeprefix('macro_')}: {value:.4f}")
    Console().print(f"Done: results in '{results_csv}', MLflow run in '{tracking_uri}'.")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
