import io
from typing import Any

import numpy as np
import pytest
import torch

from common.engines.best_probe import BestProbe
from common.metrics.multilabel import f1_thresholds
from common.networks.mil_probe import ProbeGrid

RNG = np.random.default_rng(0)
TARGETS = (RNG.random((11, 3)) < 0.4).astype(float)
SCORES = RNG.random((4, 11, 3))


def grid() -> ProbeGrid:
    return ProbeGrid(["average", "learned_attention"], [0.1, 0.01], dim=5, num_classes=3, seed=0)


def offer(best: BestProbe, auprc: list[float], step: int, network: Any = None) -> None:
    best.offer(np.array(auprc), step, network or grid(), SCORES, TARGETS)


def test_highest_of_all_probes_and_steps_is_kept() -> None:
    best = BestProbe()
    for step, auprc in ((10, [0.2, 0.5, 0.3, 0.4]), (20, [0.2, 0.3, 0.6, 0.4]), (30, [0.59, 0.1, 0.1, 0.1])):
        offer(best, auprc, step)
    assert (best.auprc, best.index, best.step) == (0.6, 2, 20)


def test_ties_keep_the_earlier_step_and_the_first_probe() -> None:
    best = BestProbe()
    offer(best, [0.2, 0.5, 0.5, 0.4], 10)
    offer(best, [0.5, 0.5, 0.5, 0.5], 20)
    assert (best.index, best.step) == (1, 10)


def test_a_probe_that_diverged_is_not_chosen() -> None:
    best = BestProbe()
    offer(best, [np.nan, 0.1, np.nan, 0.2], 10)
    assert best.index == 3


def test_weights_are_those_of_the_moment_of_choice() -> None:
    best, network = BestProbe(), grid()
    offer(best, [0.1, 0.4, 0.2, 0.3], 10, network)
    before = {name: tensor.clone() for name, tensor in network.probe(1).state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    offer(best, [0.1, 0.3, 0.2, 0.3], 20, network)
    assert sorted(best.parameters) == ["classifier.bias", "classifier.weight", "pooler.queries"]
    assert all(torch.equal(best.parameters[name], tensor) for name, tensor in before.items())


def test_thresholds_are_the_chosen_probes_f1_optimum() -> None:
    best = BestProbe()
    offer(best, [0.1, 0.2, 0.9, 0.3], 10)
    np.testing.assert_array_equal(best.thresholds.numpy(), f1_thresholds(SCORES[2], TARGETS))


@pytest.mark.parametrize("offered", [False, True])
def test_choice_survives_a_checkpoint_of_tensors_and_numbers(offered: bool) -> None:
    best, buffer = BestProbe(), io.BytesIO()
    if offered:
        offer(best, [0.1, 0.2, 0.9, 0.3], 10)
    torch.save(best.state_dict(), buffer)
    buffer.seek(0)
    restored = BestProbe()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    np.testing.assert_equal(
        (restored.auprc, restored.index, restored.step), (best.auprc, best.index, best.step)
    )
    assert torch.equal(restored.thresholds, best.thresholds)
    assert restored.parameters.keys() == best.parameters.keys()
    assert all(torch.equal(restored.parameters[name], tensor) for name, tensor in best.parameters.items())
