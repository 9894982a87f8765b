"""VISReg against a loop over views, dimensions and directions in NumPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.losses.visreg import VISReg

V, N, K, M = 3, 11, 5, 7


def projections(scale: float = 1.5, shift: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(V, N, K, generator=generator, dtype=torch.float64) + shift


def by_hand(views: np.ndarray, directions: np.ndarray) -> tuple[float, float, float]:
    """Means over views, and over dimensions or directions, of the three terms."""
    quantiles = stats.norm.ppf((np.arange(N) + 0.5) / N)
    scale, shape, centre = [], [], []
    for view in views:
        standardized = np.empty_like(view)
        for k in range(K):
            mean, std = view[:, k].mean(), view[:, k].std()
            scale.append((1 - std) ** 2)
            centre.append(mean**2)
            standardized[:, k] = (view[:, k] - mean) / std
        for m in range(M):
            along = sorted(float(sample @ directions[:, m]) for sample in standardized)
            shape.append(np.mean((np.array(along) - quantiles) ** 2))
    return float(np.mean(scale)), float(np.mean(shape)), float(np.mean(centre))


def test_the_value_is_that_of_the_loop():
    visreg = VISReg(M)
    views = projections()
    drawn = torch.randn(K, M, generator=torch.Generator().manual_seed(4)).numpy().astype(np.float64)
    directions = drawn / np.linalg.norm(drawn, axis=0)
    scale, shape, centre = by_hand(views.numpy(), directions)
    expected = 0.5 * scale + 2.0 * shape + 0.5 * centre
    assert float(visreg(views, step=4)) == pytest.approx(expected, rel=1e-6)
    assert float(visreg(views, step=5)) != pytest.approx(expected, rel=1e-6)


def test_every_term_has_its_weight():
    views = projections()
    directions = torch.nn.functional.normalize(
        torch.randn(K, M, generator=torch.Generator().manual_seed(4)), dim=0
    ).double()
    for weights, expected in zip(np.eye(3), by_hand(views.numpy(), directions.numpy()), strict=True):
        assert float(VISReg(M, *weights)(views, step=4)) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_that_of_finite_differences_but_for_the_standardization():
    views = projections().requires_grad_()
    # without the shape term, whose standard deviations are held fixed on purpose
    assert torch.autograd.gradcheck(lambda x: VISReg(M, shape_weight=0)(x, step=1), views)


def test_the_shape_term_does_not_push_on_the_spread():
    views = projections().requires_grad_()
    (gradient,) = torch.autograd.grad(VISReg(M, scale_weight=0, centre_weight=0)(views, step=1), views)
    centred = views - views.mean(1, keepdim=True)
    full = VISReg(M, scale_weight=0, centre_weight=0)
    held = full(centred.detach() * 1.001, step=1) - full(centred.detach(), step=1)
    assert abs(float(held)) < 1e-9  # the value does not know the spread
    assert float((gradient * centred.detach()).sum().abs()) > 1e-3  # the gradient of fixed deviations does


def test_a_collapsed_batch_has_a_finite_gradient():
    views = torch.zeros(1, 4, 3, requires_grad=True)
    VISReg(M)(views, step=0).backward()
    assert torch.isfinite(views.grad).all()


def test_it_is_computed_in_float32_under_autocast():
    views = projections().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = VISReg(M)(views, step=0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, VISReg(M)(views.float(), step=0), rtol=0, atol=0)


def test_directions_and_samples_must_be_there():
    with pytest.raises(ValueError, match="num_directions must be positive, got 0"):
        VISReg(0)
    with pytest.raises(ValueError, match=r"projections must have shape \(V, N, K\) with two samples, got"):
        VISReg(M)(torch.zeros(2, 1, 3), step=0)
