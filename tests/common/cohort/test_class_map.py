import numpy as np
import pytest

from common.cohort.class_map import MERGED, class_map, map_classes
from common.cohort.cohort import load_labels

CT_RATE, RAD = ([label.name for label in load_labels(name)] for name in ("ct_rate", "rad_chestct"))


def test_every_class_of_rad_chestct_is_one_of_ct_rate_but_calcification() -> None:
    rows = class_map(CT_RATE, RAD)
    assert [[CT_RATE[place] for place in places] for places in rows[1:]] == [[name] for name in RAD[1:]]
    assert [CT_RATE[place] for place in rows[0]] == list(MERGED["Calcification"])
    used = {place for places in rows for place in places}
    assert [CT_RATE[place] for place in set(range(18)) - used] == ["Mosaic attenuation pattern"]


def test_scores_and_decisions_are_those_of_a_loop_over_names() -> None:
    rng = np.random.default_rng(0)
    scores, thresholds = rng.random((23, 18)), rng.random(18)
    mapped, decisions = map_classes(scores, thresholds, CT_RATE, RAD)
    assert mapped.shape == decisions.shape == (23, 16)
    for k, name in enumerate(RAD):
        for n in range(23):
            if name == "Calcification":
                arterial, coronary = scores[n, 1], scores[n, 4]
                expected = max(arterial, coronary)
                positive = arterial >= thresholds[1] or coronary >= thresholds[4]
            else:
                expected = scores[n, CT_RATE.index(name)]
                positive = expected >= thresholds[CT_RATE.index(name)]
            assert mapped[n, k] == expected
            assert decisions[n, k] == positive


def test_a_merged_class_is_positive_below_the_threshold_of_its_largest_score() -> None:
    """The larger probability misses its own threshold, the smaller one reaches its own."""
    scores, thresholds = np.full((1, 18), 0.0), np.full(18, 1.0)
    scores[0, [1, 4]], thresholds[[1, 4]] = (0.3, 0.8), (0.2, 0.9)
    mapped, decisions = map_classes(scores, thresholds, CT_RATE, RAD)
    assert mapped[0, 0] == 0.8
    assert decisions[0].tolist() == [True] + [False] * 15


def test_a_class_of_the_same_name_goes_before_its_parts_and_one_that_the_probe_lacks_is_named() -> None:
    assert class_map(["Calcification", *MERGED["Calcification"]], ["Calcification"]) == [[0]]
    with pytest.raises(ValueError, match=r"does not know 'Fracture'.*\['Emphysema'\]"):
        class_map(["Emphysema"], ["Emphysema", "Fracture"])
    with pytest.raises(ValueError, match="'Coronary artery wall calcification'.*'Calcification'"):
        class_map(["Arterial wall calcification"], ["Calcification"])
    with pytest.raises(ValueError, match=r"18 classes, got shapes \(2, 17\) and \(18,\)"):
        map_classes(np.zeros((2, 17)), np.zeros(18), CT_RATE, RAD)
