import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from common.metrics.patient_ranking import rank_by_patient, resampled_areas


def draw(seed: int, samples: int, patients: int, ties: bool):
    rng = np.random.default_rng(seed)
    targets = rng.random(samples) < 0.2
    scores = rng.standard_normal(samples) + targets
    scores = scores.round(1) if ties else scores
    weights = rng.multinomial(patients, np.full(patients, 1 / patients), size=7)
    return scores.astype(np.float32), targets, rng.integers(0, patients, samples), weights


@pytest.mark.parametrize("ties", [True, False])
def test_areas_are_sklearns_with_the_draws_as_weights(ties: bool) -> None:
    scores, targets, patients, weights = draw(0, samples=503, patients=11, ties=ties)
    auroc, auprc = resampled_areas(rank_by_patient(scores, targets, patients, 11), weights)
    for resample, weight in enumerate(weights):
        of_sample = weight[patients]
        assert auroc[resample] == pytest.approx(
            roc_auc_score(targets, scores, sample_weight=of_sample), abs=1e-12
        )
        assert auprc[resample] == pytest.approx(
            average_precision_score(targets, scores, sample_weight=of_sample), abs=1e-12
        )


def test_areas_are_those_of_the_repeated_samples() -> None:
    scores, targets, patients, weights = draw(1, samples=211, patients=5, ties=True)
    _, auprc = resampled_areas(rank_by_patient(scores, targets, patients, 5), weights)
    rows = np.concatenate([np.flatnonzero(patients == p) for p, n in enumerate(weights[3]) for _ in range(n)])
    assert auprc[3] == pytest.approx(average_precision_score(targets[rows], scores[rows]), abs=1e-12)


def test_shared_steps_change_the_areas_by_less_than_a_thousandth() -> None:
    scores, targets, patients, weights = draw(2, samples=60_000, patients=13, ties=False)
    exact = resampled_areas(rank_by_patient(scores, targets, patients, 13, max_steps=10**6), weights)
    shared = resampled_areas(rank_by_patient(scores, targets, patients, 13, max_steps=1024), weights)
    for one, other in zip(exact, shared, strict=True):
        assert 0 < np.abs(one - other).max() < 1e-3


def test_a_resample_without_a_positive_is_undefined() -> None:
    ranking = rank_by_patient([0.3, 0.2, 0.1], [1, 0, 0], [0, 1, 2], num_patients=3)
    auroc, auprc = resampled_areas(ranking, [[0, 2, 1], [1, 1, 1], [3, 0, 0]])
    assert np.isnan(auroc).tolist() == [True, False, True]
    assert np.isnan(auprc).tolist() == [True, False, False]
    none = rank_by_patient([0.3, 0.2], [0, 0], [0, 1], num_patients=2)
    assert np.isnan(resampled_areas(none, [[1, 1]])).all()


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have one shape \(N,\), got \(2,\), \(3,\) and \(2,\)"):
        rank_by_patient([0.1, 0.2], [0, 1, 0], [0, 1], 2)
    with pytest.raises(ValueError, match="scores must not be nan, got nan for sample 1"):
        rank_by_patient([0.1, float("nan")], [0, 1], [0, 1], 2)
