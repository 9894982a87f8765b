"""Scores of reports, against scikit-learn and values by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from common.metrics.bootstrap import resample_weights
from common.writing.scores import (
    decision_samples,
    macro_differences,
    macro_numbers,
    share_owed,
    text_scores,
)

RNG = np.random.default_rng(0)
LABELS = (RNG.random((31, 5)) < 0.3).astype(float)
CALLED = np.where(RNG.random((31, 5)) < 0.7, LABELS, 1 - LABELS)
LABELS[:, 3], CALLED[:, 4] = 0, 0  # a class without positives, and one that is never called
WEIGHTS = resample_weights([f"{place // 2}" for place in range(31)], 20, seed=1)


def test_classes_and_resamples_are_scikit_learns() -> None:
    found = decision_samples(CALLED, LABELS, WEIGHTS)
    for row, weight in enumerate([np.ones(31), *WEIGHTS]):
        for place in range(5):
            expected = precision_recall_fscore_support(
                LABELS[:, place], CALLED[:, place], sample_weight=weight, average="binary", zero_division=0
            )
            ours = [found[name][row, place] for name in ("precision", "recall", "f1")]
            if (LABELS[:, place] * weight).sum() == 0:
                assert np.isnan(ours).all()
            else:
                assert ours == pytest.approx(expected[:3])


def test_means_differences_and_the_share_owed_go_resample_by_resample() -> None:
    one, other = decision_samples(LABELS, LABELS, WEIGHTS), decision_samples(CALLED, LABELS, WEIGHTS)
    assert macro_numbers(one)["macro_f1"] == (1, 1, 1)
    means = np.nanmean(other["f1"], 1)
    value, low, high = macro_numbers(other)["macro_f1"]
    assert (value, low, high) == pytest.approx([means[0], *np.quantile(means[1:], [0.025, 0.975])])
    difference = macro_differences(one, other)["macro_f1"]
    assert difference[:3] == pytest.approx([1 - value, 1 - high, 1 - low])
    assert share_owed(one, other) == pytest.approx(difference[:3])
    nothing = decision_samples(np.zeros_like(CALLED), LABELS, WEIGHTS)
    assert math.isnan(share_owed(nothing, other)[0])


def test_words_are_compared_in_lower_case_by_bleu_and_rouge() -> None:
    text = "The heart is enlarged. No nodule is seen."
    assert text_scores([text.upper()], [text]) == pytest.approx(
        {"bleu_4": 1, "rouge_l": 1, "meteor_without_synonyms": 1 - 0.5 / 10**3}
    )
    assert text_scores(["", "x"], [text, text]) == {
        **{"bleu_4": 0, "rouge_l": 0},
        "meteor_without_synonyms": 0,
    }
    # "the heart is enlarged ." of 10 tokens: all its n-grams are right, brevity exp(1 - 10/5), P 1, R 1/2
    found = text_scores(["The heart is enlarged."], [text])
    assert found["bleu_4"] == pytest.approx(math.exp(1 - 10 / 5))
    assert found["rouge_l"] == pytest.approx(2 * 0.5 / 1.5)
    # F is P R / (.9 P + .1 R), less .5 (4 / 5)^3 of it: NLTK takes the last "is" and ".", so 4 chunks of 5
    assert found["meteor_without_synonyms"] == pytest.approx(0.5 / 0.95 * (1 - 0.5 * (4 / 5) ** 3))


def test_meteor_knows_stems_and_no_synonyms() -> None:
    # "nodules" and "nodule" have one stem, "big" and "large" are not one word: 2 of 4 match, in two chunks
    found = text_scores(["big nodules are seen"], ["large nodule is seen"])["meteor_without_synonyms"]
    assert found == pytest.approx(2 / 4 * (1 - 0.5 * (2 / 2) ** 3))
    found = text_scores(["two nodules seen now"], ["two nodule seen before"])["meteor_without_synonyms"]
    assert found == pytest.approx(3 / 4 * (1 - 0.5 * (1 / 3) ** 3))
