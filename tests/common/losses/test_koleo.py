"""KoLeo against a loop over samples and their neighbours."""

import numpy as np
import pytest
import torch

from common.losses.koleo import koleo_loss


def test_it_is_minus_the_mean_log_distance_to_the_nearest_other_sample_of_the_view() -> None:
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
    unit = (cls / cls.norm(dim=-1, keepdim=True)).numpy()
    total = 0.0
    for view in range(2):
        for sample in range(6):
            others = [np.linalg.norm(unit[sample, view] - unit[i, view]) for i in range(6) if i != sample]
            total -= np.log(min(others)) / 6
    assert float(koleo_loss(cls)) == pytest.approx(total, rel=1e-6)


def test_its_gradient_drives_neighbours_apart() -> None:
    cls = torch.tensor([[[1.0, 0.1]], [[1.0, -0.1]], [[-1.0, 0.0]]], requires_grad=True)
    koleo_loss(cls).backward()
    assert cls.grad[0, 0, 1] < 0 < cls.grad[1, 0, 1]


def test_equal_samples_stay_finite() -> None:
    cls = torch.ones(3, 1, 4, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(cls.grad).all()


def test_one_sample_has_no_neighbour() -> None:
    with pytest.raises(ValueError, match="cls must hold at least two samples, got 1"):
        koleo_loss(torch.ones(1, 2, 4))
