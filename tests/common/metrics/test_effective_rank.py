"""Effective rank tells a healthy batch from a collapsed one."""

import numpy as np
import pytest
import torch

from common.metrics.effective_rank import effective_rank


def test_effective_rank_equals_the_entropy_of_numpys_singular_values():
    embeddings = np.random.default_rng(0).normal(size=(23, 7)) * np.arange(1, 8)
    singular = np.linalg.svd(embeddings - embeddings.mean(0), compute_uv=False)
    shares = singular / singular.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.from_numpy(embeddings)) == pytest.approx(expected, rel=1e-4)


def test_points_on_a_line_have_rank_one_and_equal_points_zero():
    line = torch.arange(11.0)[:, None] * torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    assert effective_rank(line + 3) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((7, 5), 2.7)) == 0
