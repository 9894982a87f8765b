"""Parts of training reports; what a run gives is in tests/bundles/test_report_runs.py."""

import numpy as np
import pytest
import torch
from torch import nn

from common.embeddings.bags import EmbeddingBags
from common.embeddings.store import EmbeddingStoreWriter
from common.writing.scores import decision_samples
from common.writing.trainer import (
    BestWeights,
    best_constant,
    check_tokens_lie_along_z,
    other_patients,
    shared,
)


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


@pytest.mark.parametrize(
    ("kind", "axes", "refused"),
    [("grid", "RAS", "of a grid with axes RAS"), ("grid", "SPL", None), ("organ", None, "of organs")],
)
def test_zones_are_refused_where_tokens_do_not_lie_along_z(kind, axes, refused, tmp_path) -> None:
    identity = {"encoder": "colipri", "encoder_id": "x", "preprocessing": "none", "slice_order": "none"}
    with EmbeddingStoreWriter(tmp_path, identity | {"token_kind": kind}, "float32") as writer:
        writer.add("a", torch.ones(8, 3), (1, 1, 1), grid_shape=[2, 2, 2], axcodes=axes)
    (tmp_path / "labels.csv").write_text("VolumeName\na\n")
    bags = EmbeddingBags(tmp_path, tmp_path / "labels.csv", [])
    if refused is None:
        check_tokens_lie_along_z(bags)
        return
    with pytest.raises(ValueError, match=f"zones needs.*'colipri' are {refused}.*--bridge perceiver"):
        check_tokens_lie_along_z(bags)


def test_parts_of_a_work_come_back_in_order() -> None:
    assert shared(range(5), 2, sum) == [1, 5, 4]
