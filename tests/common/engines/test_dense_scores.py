from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from common.cohort.cohort import load_labels
from common.embeddings.dense_cohort import DenseCohort
from common.engines import dense_scores
from common.engines.dense_scores import each_column, report_on_test, validation_auprc

NAMES = [label.name for label in load_labels("totalsegmentator")]


@pytest.fixture
def cohort(write_dense: Any) -> DenseCohort:
    return DenseCohort(*write_dense(num_volumes=9), [f"valid_{n}_a_1" for n in (1, 9, 4, 5, 7)])


def test_columns_are_those_of_the_linear_layer(cohort: DenseCohort, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(9, 7)
    monkeypatch.setattr(dense_scores, "SCORE_BYTES", 3 * 4 * cohort.num_rows["patch"])
    scores = np.stack(list(each_column(cohort, "patch", layer.weight.detach(), layer.bias.detach())))
    expected = layer(torch.cat(list(cohort.tokens("patch")))).detach().T
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_validation_is_sklearns_for_every_probe_and_class(cohort: DenseCohort) -> None:
    weight, bias = torch.randn(3, 132, 9), torch.randn(3, 132)
    bias[1, 15] = float("nan")
    values = validation_auprc(cohort, "cls", weight, bias)
    tokens = torch.cat(list(cohort.tokens("cls")))
    for rate, column in ((0, 0), (2, 1), (1, 16), (0, 17)):
        scores = tokens @ weight[rate, column] + bias[rate, column]
        expected = average_precision_score(cohort.targets("cls", column), scores)
        assert values[rate, column] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(values[:, 100]).all()  # no positive
    assert np.isnan(values[:, 15]).tolist() == [False, True, False]


def test_report_is_sklearns_and_its_interval_that_of_resampled_patients(cohort: DenseCohort) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(9, 118)
    report = report_on_test(
        *(cohort, "patch"),
        **{"first_column": 14, "layer": layer, "class_names": NAMES, "num_resamples": 40, "seed": 3},
        averaged=lambda name, n: name != "background" and n >= 5,
    )
    scores = layer(torch.cat(list(cohort.tokens("patch")))).detach().numpy()
    targets = np.stack([cohort.targets("patch", 14 + organ) for organ in (1, 2, 3)], axis=1)
    for organ, name in enumerate(NAMES[1:4]):
        values = report["per_class"][name]
        assert values["auroc"] == pytest.approx(roc_auc_score(targets[:, organ], scores[:, organ + 1]))
        assert values["positives"] == targets[:, organ].sum()
    assert sorted(report["left_out"]) == sorted({*NAMES} - {*NAMES[1:4]})
    mean, (low, high) = report["macro"]["auprc"]
    assert mean == pytest.approx(average_precision_score(targets, scores[:, 1:4], average="macro"))
    patients, drawn = cohort.patient_of_row("patch"), []
    for weights in dense_scores.resample_weights(cohort.patients, 40, 3):
        rows = np.repeat(np.arange(len(patients)), weights[patients].astype(int))
        drawn.append(average_precision_score(targets[rows], scores[rows, 1:4], average="macro"))
    assert report["resampled"]["auprc"] == pytest.approx(np.array(drawn), abs=1e-9)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-9)
