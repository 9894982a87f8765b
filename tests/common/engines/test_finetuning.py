"""Shares of a global batch; what a run of them gives is in tests/bundles/test_finetuning_runs.py."""

import ignite.distributed as idist
import pytest
import torch

from common.engines.finetuning import rank_share
from common.engines.probe_grid import BestProbe


@pytest.mark.parametrize(("size", "world"), [(1, 1), (5, 1), (4, 2), (5, 2), (1, 4), (7, 3)])
def test_ranks_share_a_batch_as_one_mean_and_run_equally_often(size, world, monkeypatch) -> None:
    batch, values = [*range(10, 10 + size)], torch.randn(100, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(idist, "get_world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        shares.append(rank_share(batch))
    assert len({len(share) for share in shares}) == 1
    mean_over_ranks = sum(values[index] * weight for share in shares for index, weight in share) / world
    torch.testing.assert_close(mean_over_ranks, values[batch].mean())


def test_the_best_weights_are_plain_tensors_and_numbers(tmp_path) -> None:
    best = BestProbe()
    best.auprc, best.step, best.parameters = 0.5, 3, {"a": torch.ones(2)}
    torch.save(best.state_dict(), tmp_path / "best.pt")
    found = BestProbe()
    found.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert (found.auprc, found.step, found.parameters["a"].tolist()) == (0.5, 3, [1, 1])
