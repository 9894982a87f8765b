"""How well written reports agree with those of radiologists: in what they state, and in their words."""

# N reports, C classes, R resamples

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from ignite.metrics.nlp import Bleu, RougeL
from nltk.translate.meteor_score import single_meteor_score
from numpy.typing import ArrayLike, NDArray

from common.metrics.bootstrap import Difference, interval, macro_means, paired_difference
from common.reports.results import Numbers

DECISIONS = ("f1", "precision", "recall")


def decision_samples(
    called: ArrayLike, labels: ArrayLike, weights: ArrayLike
) -> dict[str, NDArray[np.float64]]:
    """Return F1, precision and recall of each class, on all reports and on each resample.

    A class without positives is nan; one that is never called has precision and F1 0, as in the literature.

    Source: equals scikit-learn's ``precision_recall_fscore_support`` with ``zero_division=0``.

    Args:
        called: 0 or 1, ``(N, C)``, what the written reports state.
        labels: 0 or 1, ``(N, C)``.
        weights: how often each report is in each resample, ``(R, N)``, from ``resample_weights``.

    Returns:
        Each of ``DECISIONS``, ``(1 + R, C)``.
    """
    call, label = np.asarray(called, np.float64), np.asarray(labels, np.float64)
    weight = np.concatenate([np.ones((1, len(call))), np.asarray(weights, np.float64)])
    hits, num_called, positive = weight @ (call * label), weight @ call, weight @ label
    parts = {"f1": num_called + positive, "precision": num_called, "recall": positive}
    return {
        name: np.where(positive > 0, (1 + (name == "f1")) * hits / np.maximum(below, 1), np.nan)
        for name, below in parts.items()
    }


def macro_numbers(samples: dict[str, NDArray[np.float64]]) -> Numbers:
    """Return the macro means of :func:`decision_samples` with their 95 % intervals."""
    found = {}
    for name, values in samples.items():
        of_all, *resampled = macro_means(values).tolist()
        found[f"macro_{name}"] = (of_all, *interval(resampled))
    return found


def macro_differences(
    one: dict[str, NDArray[np.float64]], other: dict[str, NDArray[np.float64]]
) -> dict[str, Difference]:
    """Return the paired differences of macro means, ``one`` less ``other``, on the same resamples."""
    return {
        f"macro_{name}": paired_difference(macro_means(one[name]), macro_means(other[name])) for name in one
    }


def share_owed(
    one: dict[str, NDArray[np.float64]], other: dict[str, NDArray[np.float64]]
) -> tuple[float, ...]:
    """Return which share of the macro F1 of ``one`` is lost in ``other``, 1 - F1' / F1, and its interval."""
    first, second = macro_means(one["f1"]), macro_means(other["f1"])
    with np.errstate(divide="ignore", invalid="ignore"):
        value, *resampled = np.where(first > 0, 1 - second / first, np.nan).tolist()
    return (value, *interval(resampled))


def text_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return BLEU-4 of the whole set, mean ROUGE-L (F1) and mean METEOR, in lower case, of words and stops.

    Source: Ignite's ``Bleu`` (micro average, unsmoothed) and ``RougeL``, NLTK's METEOR, with its
    alignment (of equal words the last). METEOR counts equal words and equal stems: synonyms would need
    WordNet, which is not at hand everywhere. Tokens are our choice; numbers of other tokenizers differ by
    some points.
    """
    bleu, rouge, meteor = Bleu(ngram=4, average="micro"), RougeL(alpha=0.5), []
    for text, reference in zip(written, references, strict=True):
        # Ignite divides by the length of a text, and no word of a reference is this one
        ours, theirs = _tokens(text) or ["<empty>"], _tokens(reference)
        bleu.update(([ours], [[theirs]]))
        rouge.update(([ours], [[theirs]]))
        meteor.append(single_meteor_score(theirs, ours, wordnet=_NoSynonyms()))
    of_bleu: Any = bleu.compute()
    found = {"bleu_4": float(of_bleu), "rouge_l": float(rouge.compute()["Rouge-L-F"])}
    return found | {"meteor_without_synonyms": fmean(meteor)}


class _NoSynonyms:
    """Stands where NLTK asks WordNet."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())
