"""A rank that comes late to a meeting of the run is waited for, longer than within a step."""

import csv
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from common.ct.rejection import RejectedVolume
from common.embeddings.work import report_rejected
from common.run import process
from tests.distributed.conftest import run_two_ranks

pytestmark = pytest.mark.two_ranks

LATE_SECONDS = 4.0


def run_rank(folder: Path) -> None:
    """Be rank 0 or the late rank 1, of which the first waits 2 seconds within a step."""
    process.STEP_TIMEOUT = timedelta(seconds=LATE_SECONDS / 2)
    process.join_ranks()
    rank = dist.get_rank()
    for _ in range(2):
        time.sleep(rank * LATE_SECONDS)
        process.wait_for_ranks()
    time.sleep(rank * LATE_SECONDS)
    report_rejected(folder, [RejectedVolume(f"volume_{rank}", "unreadable", "cut off")], 4, max_rejected=0.5)
    (folder / f"met_{rank}").touch()
    time.sleep(rank * LATE_SECONDS)  # the control: the same wait within a step
    dist.all_reduce(torch.zeros(1))


def test_a_late_rank_is_waited_for_but_not_within_a_step(tmp_path: Path) -> None:
    statuses, said = run_two_ranks(__file__, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("met_*")) == ["met_0", "met_1"], "\n".join(said)
    with (tmp_path / "rejected.csv").open() as file:
        assert [row["volume"] for row in csv.DictReader(file)] == ["volume_0", "volume_1"]
    assert statuses[0] != 0
    assert "Timed out waiting 2000ms" in said[0]


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
