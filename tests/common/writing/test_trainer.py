"""Parts of training reports; what a run gives is in tests/bundles/test_report_runs.py."""

import numpy as np
import pytest
import torch
from torch import nn

from common.writing.scores import decision_samples
from common.writing.trainer import BestWeights, best_constant, other_patients


@pytest.mark.parametrize("groups", ["abcd", "aabbc", "abab", "aabccd", "aaabbbccd"])
def test_each_volume_is_swapped_once_for_one_of_another_patient(groups) -> None:
    for seed in range(5):
        partners = other_patients(groups, seed)
        assert sorted(partners) == list(range(len(groups)))
        assert all(groups[place] != groups[partner] for place, partner in enumerate(partners))
    assert len({tuple(other_patients("abcdefgh", seed)) for seed in range(5)}) > 1


def test_a_patient_with_most_volumes_cannot_be_swapped() -> None:
    with pytest.raises(ValueError, match="One patient has 3 of 5"):
        other_patients("aaabc", 0)


def test_the_best_constant_is_found_by_trying_all() -> None:
    rng = np.random.default_rng(0)
    train, validation = ((rng.random((number, 6)) < 0.4).astype(float) for number in (20, 13))
    tried = []
    for row in train:
        f1 = decision_samples(np.tile(row, (13, 1)), validation, np.ones((1, 13)))["f1"][0]
        tried.append(np.nanmean(f1))
    assert best_constant(train, validation) == int(np.argmax(tried))


def test_the_lowest_loss_keeps_a_copy_that_a_file_of_tensors_holds(tmp_path) -> None:
    weight = nn.Parameter(torch.zeros(2))
    best, learned = BestWeights(), nn.ParameterDict({"a": weight})
    for step, loss in enumerate([2.0, 1.0, 1.0, 3.0]):
        weight.data += 1
        best.offer(loss, step, learned)
    torch.save(best.state_dict(), tmp_path / "best.pt")
    found = BestWeights()
    found.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert (found.loss, found.step, found.parameters["a"].tolist()) == (1.0, 1, [2, 2])
