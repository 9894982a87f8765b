"""The schedule of the recipe, step by step."""

import math

import pytest
import torch

from common.optimizers.warmup_cosine import warmup_cosine


def test_learning_rate_rises_linearly_and_falls_along_a_cosine_to_the_floor():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3e-4)
    scheduler = warmup_cosine(optimizer, warmup_steps=5, total_steps=50, final_lr=3e-5)
    used = []
    for _ in range(55):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used[0] == 0
    assert used[5] == pytest.approx(3e-4)
    assert used[3] == pytest.approx(3e-4 * 3 / 5)
    for step in (17, 31, 44):
        expected = 3e-5 + (3e-4 - 3e-5) * (1 + math.cos(math.pi * (step - 5) / 45)) / 2
        assert used[step] == pytest.approx(expected)
    assert used[50] == used[54] == pytest.approx(3e-5)


def test_warmup_longer_than_the_run_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup_steps must be between 0 and max_steps = 10, got 11"):
        warmup_cosine(optimizer, warmup_steps=11, total_steps=10, final_lr=0.1)
