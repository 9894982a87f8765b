import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from common.cohort.cohort import load_labels, read_labels, split_by_patient
from common.embeddings.bags import EmbeddingBags
from common.engines import neighbour_probe as module
from common.engines.neighbour_probe import average_embeddings
from common.reports.results import read_rows

CT_RATE = [label.name for label in load_labels("ct_rate")]


@pytest.fixture
def given(write_cohort: Any) -> dict[str, Path]:
    train = write_cohort("train", 60, dim=20, signal=1.5, classes=CT_RATE, seed=1)
    test = write_cohort("valid", 24, dim=20, signal=1.5, classes=CT_RATE, seed=2)
    return {
        "train-embeddings": train[0],
        "train-labels": train[1],
        "test-embeddings": test[0],
        "test-labels": test[1],
    }


def invoke(given: dict[str, Path], tmp_path: Path, *further: object) -> Any:
    options = given | {
        "results-csv": tmp_path / "results.csv",
        "tracking-uri": f"sqlite:///{tmp_path}/mlflow.db",
        "num-val-patients": 6,
        "num-resamples": 50,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return CliRunner().invoke(module.app, [*arguments, *map(str, further)], env={"COLUMNS": "160"})


def test_rows_are_scikit_learns_knn_on_average_embeddings(given, tmp_path):
    answer = invoke(given, tmp_path, "--k", 5, "--k", 3)
    assert answer.exit_code == 0, answer.output
    rows = {(row.protocol, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    split = split_by_patient(list(read_labels(given["train-labels"], [])), 6, 42)
    bank = EmbeddingBags(given["train-embeddings"], given["train-labels"], CT_RATE, volumes=split["train"])
    test = EmbeddingBags(given["test-embeddings"], given["test-labels"], CT_RATE)
    means = [
        np.stack([bags[index]["tokens"].numpy().mean(0) for index in range(len(bags))])
        for bags in (bank, test)
    ]
    for k, weighting, theirs in ((5, "majority", "uniform"), (3, "distance", "distance")):
        values = {"auroc": [], "auprc": []}
        for c in range(18):
            classifier = KNeighborsClassifier(k, weights=theirs, metric="cosine")
            classifier.fit(means[0], bank.labels[:, c].int().numpy())
            scores, truth = classifier.predict_proba(means[1])[:, 1], test.labels[:, c].numpy()
            values["auroc"].append(roc_auc_score(truth, scores))
            values["auprc"].append(average_precision_score(truth, scores))
        for metric, of_classes in values.items():
            row = rows[f"knn_{k}_{weighting}", f"macro_{metric}"]
            assert row.value == pytest.approx(np.mean(of_classes), abs=2e-6)
            assert row.low < row.value < row.high
            assert (row.encoder, row.dataset, row.n) == ("dale_ct_2s", "ct_rate", 24)
    assert rows["knn_5_majority", "macro_auroc"].value > 0.6
    assert f"recall_at_5: {rows['retrieval', 'macro_recall_at_5'].value:.4f}" in answer.output


def test_thresholds_are_the_best_f1_on_validation(given, tmp_path):
    answer = invoke(given, tmp_path, "--k", 5)
    assert answer.exit_code == 0, answer.output
    rows = {(row.protocol, row.metric): row for row in read_rows(tmp_path / "results.csv")}
    split = split_by_patient(list(read_labels(given["train-labels"], [])), 6, 42)
    bank, validation = (
        EmbeddingBags(given["train-embeddings"], given["train-labels"], CT_RATE, volumes=split[side])
        for side in ("train", "validation")
    )
    test = EmbeddingBags(given["test-embeddings"], given["test-labels"], CT_RATE)
    f1s = []
    for c in range(18):
        classifier = KNeighborsClassifier(5, metric="cosine")
        classifier.fit(average_embeddings(bank), bank.labels[:, c].int().numpy())
        scores = {
            name: classifier.predict_proba(average_embeddings(bags))[:, 1]
            for name, bags in (("validation", validation), ("test", test))
        }
        truth = validation.labels[:, c].numpy()
        threshold = 0.5
        if truth.any():
            precision, recall, thresholds = precision_recall_curve(truth, scores["validation"])
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            threshold = max(
                t for t, value in zip(thresholds, f1[:-1], strict=True) if value > f1.max() - 1e-9
            )
        called, labels = scores["test"] >= threshold - 1e-9, test.labels[:, c].numpy() == 1
        f1s.append(2 * (called & labels).sum() / (called.sum() + labels.sum()))
    assert rows["knn_5_majority", "macro_f1"].value == pytest.approx(np.mean(f1s), abs=2e-6)


def test_retrieval_is_reported_by_label(given, tmp_path):
    invoke(given, tmp_path, "--k", 5)
    rows = {
        row.metric: row.value for row in read_rows(tmp_path / "results.csv") if row.protocol == "retrieval"
    }
    by_class = [rows[f"recall_at_5/{name}"] for name in CT_RATE]
    assert rows["macro_recall_at_5"] == pytest.approx(np.nanmean(by_class), abs=2e-6)
    assert not math.isnan(by_class[0])
    assert rows["macro_precision_at_5"] > rows["macro_prevalence"]


def test_embeddings_of_two_encoders_are_refused(given, tmp_path, write_cohort):
    folder, labels_csv = write_cohort("other", 8, dim=20, classes=CT_RATE, encoder="dale_ct_0")
    answer = invoke(given | {"test-embeddings": folder, "test-labels": labels_csv}, tmp_path)
    assert isinstance(answer.exception, ValueError)
    assert "'dale_ct_0'" in str(answer.exception)
