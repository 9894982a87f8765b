import numpy as np
import torch

from common.engines.best_layers import BestLayers
from common.networks.dense_probe import DenseProbes


def test_the_best_learning_rate_and_step_are_kept_and_restored() -> None:
    probes, best = DenseProbes({"rex": 3, "ts": 4}, [0.1, 0.01], dim=5, seed=0), BestLayers()
    with torch.no_grad():
        probes.weights[1].add_(1)
    best.offer(("patch", "ts"), np.array([np.nan, 0.4]), 10, probes)
    expected = probes.layer(1, 1, probes.columns["ts"])
    with torch.no_grad():
        probes.weights[1].add_(1)
    best.offer(("patch", "ts"), np.array([0.4, 0.1]), 20, probes)
    best.offer(("cls", "rex"), np.array([0.1, 0.1]), 20, probes)
    assert (best.chosen["patch", "ts"]["rate"], best.chosen["patch", "ts"]["step"]) == (1, 10)
    assert best.chosen["cls", "rex"]["rate"] == 0
    restored = BestLayers()
    restored.load_state_dict(best.state_dict())
    for choice in (best, restored):
        assert torch.equal(choice.layer(("patch", "ts")).weight, expected.weight)
    assert restored.chosen["patch", "ts"]["auprc"] == 0.4
