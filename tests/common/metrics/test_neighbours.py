import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from common.metrics.neighbours import Neighbours, cosine_neighbours, knn_scores, retrieval_report

NAMES = ["Emphysema", "Lung nodule", "Atelectasis", "Fracture"]


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bank_labels = (rng.random((41, 4)) < 0.4).astype(float)
    query_labels = (rng.random((13, 4)) < 0.4).astype(float)
    bank_labels[:, 3] = 0
    query_labels[:, 2] = 0
    return {
        "bank": rng.standard_normal((41, 6)) + 0.5,
        "queries": rng.standard_normal((13, 6)) + 0.5,
        "bank_labels": bank_labels,
        "query_labels": query_labels,
    }


def found(data: dict[str, np.ndarray], k: int) -> Neighbours:
    return cosine_neighbours(data["queries"], data["bank"], k)


def labels_of(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: data[name] for name in ("query_labels", "bank_labels")}


def test_neighbours_are_those_of_a_loop_over_all_pairs(data):
    nearest = found(data, 7)
    for query, places, distances in zip(data["queries"], *nearest, strict=True):
        lengths = np.linalg.norm(query) * np.linalg.norm(data["bank"], axis=1)
        expected = 1 - (data["bank"] @ query) / lengths
        order = expected.argsort()[:7]
        np.testing.assert_array_equal(places, order)
        np.testing.assert_allclose(distances, expected[order], atol=1e-12)


@pytest.mark.parametrize(("weights", "theirs"), [("majority", "uniform"), ("distance", "distance")])
def test_scores_are_scikit_learns_class_by_class(data, weights, theirs):
    ours = knn_scores(found(data, 7), data["bank_labels"], weights)
    assert ours.shape == (13, 4)
    for c in range(3):
        classifier = KNeighborsClassifier(7, weights=theirs, metric="cosine")
        classifier.fit(data["bank"], data["bank_labels"][:, c].astype(int))
        theirs_of_class = classifier.predict_proba(data["queries"])[:, 1]
        np.testing.assert_allclose(ours[:, c], theirs_of_class, atol=1e-12, rtol=0)
    assert (ours[:, 3] == 0).all()


def test_a_query_that_is_in_the_bank_outweighs_the_others(data):
    data["queries"][0] = 3 * data["bank"][9]
    scores = knn_scores(found(data, 7), data["bank_labels"], "distance")
    np.testing.assert_allclose(scores[0], data["bank_labels"][9], atol=1e-6)


def test_length_does_not_matter_and_16_bits_are_taken(data):
    scaled = data | {"bank": data["bank"] * np.arange(1, 42)[:, None]}
    np.testing.assert_array_equal(found(scaled, 5).places, found(data, 5).places)
    half = cosine_neighbours(data["queries"].astype(np.float16), data["bank"].astype(np.float16), 5)
    np.testing.assert_allclose(half.distances, found(data, 5).distances, atol=2e-3)


def test_retrieval_is_that_of_a_loop(data):
    nearest = found(data, 9)
    report = retrieval_report(nearest, **labels_of(data), names=NAMES, ks=(1, 5, 9))
    for c, name in enumerate(NAMES):
        queries = [q for q in range(13) if data["query_labels"][q, c] == 1]
        relevant = {n for n in range(41) if data["bank_labels"][n, c] == 1}
        for k in (1, 5, 9):
            hits = [len(relevant & set(nearest.places[q, :k].tolist())) for q in queries]
            expected = {"precision": [hit / k for hit in hits], "hit": [hit > 0 for hit in hits]}
            expected["recall"] = [hit / len(relevant) for hit in hits] if relevant else []
            for metric, values in expected.items():
                mean = np.mean(values) if values else math.nan
                assert report[name][f"{metric}_at_{k}"] == pytest.approx(mean, abs=1e-12, nan_ok=True)
        chance = len(relevant) / 41 if queries else math.nan
        assert report[name]["prevalence"] == pytest.approx(chance, nan_ok=True)
    assert report["Fracture"]["precision_at_5"] == 0
    assert math.isnan(report["Fracture"]["recall_at_5"])
    assert math.isnan(report["Atelectasis"]["hit_at_5"])


def test_what_cannot_be_searched_is_refused(data):
    nearest = found(data, 3)
    zero, undefined = np.ones((2, 3, 4))
    zero[1], undefined[1] = 0, math.nan
    for call, message in (
        (lambda: found(data, 42), "k must be at least 1 and at most 41, .* got 42"),
        (lambda: cosine_neighbours(np.ones((2, 3)), zero, 1), r"width, got shapes \(2, 3\) and \(3, 4\)"),
        (lambda: cosine_neighbours(np.ones((2, 4)), zero, 1), "bank must .* got 0.0 in row 1"),
        (lambda: cosine_neighbours(np.ones((2, 4)), undefined, 1), "bank must .* got nan in row 1"),
        (
            lambda: knn_scores(nearest, data["bank_labels"], "softmax"),
            "weights .* got 'softmax'",
        ),
        (
            lambda: retrieval_report(nearest, **labels_of(data), names=NAMES, ks=(1, 5)),
            r"ks .* \[1, 5\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
