"""LeJEPA's loss against its equation."""

import pytest
import torch

from common.losses.lejepa import LeJEPALoss, invariance_loss
from common.losses.sigreg import SIGReg

# V views, N samples, K features: all different
V, N, K = 5, 3, 7


def projections() -> torch.Tensor:
    return torch.randn(V, N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("num_global", [1, 2, 5])
def test_invariance_is_the_mean_squared_distance_to_the_centre_of_the_global_views(num_global: int) -> None:
    views = projections()
    total = 0.0
    for sample in range(N):
        for feature in range(K):
            centre = sum(float(views[view, sample, feature]) for view in range(num_global)) / num_global
            total += sum((centre - float(views[view, sample, feature])) ** 2 for view in range(V))
    assert float(invariance_loss(views, num_global)) == pytest.approx(total / (V * N * K), rel=1e-12)


def test_invariance_has_the_value_by_hand() -> None:
    # centre of 0 and 2 is 1; the squared distances of 0, 2 and 5 are 1, 1 and 16
    assert float(invariance_loss(torch.tensor([[[0.0]], [[2.0]], [[5.0]]]), num_global=2)) == 6.0


def test_invariance_is_zero_for_equal_views_wherever_they_are() -> None:
    views = projections()[:1].expand(V, N, K)
    assert float(invariance_loss(views, num_global=2)) == pytest.approx(0, abs=1e-30)


def test_gradient_reaches_views_and_centre() -> None:
    views = projections().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: invariance_loss(x, num_global=2), views)
    # moving all views alike changes nothing: with a detached centre the gradients would not cancel
    (gradient,) = torch.autograd.grad(invariance_loss(views, num_global=2), views)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(N, K, dtype=torch.float64))


def test_loss_weighs_invariance_and_sigreg_as_equation_1() -> None:
    views = projections()
    terms = LeJEPALoss(SIGReg(11, 9, 2.0), 0.3)(views, num_global=2, step=4)
    assert terms.keys() == {"loss", "invariance", "sigreg"}
    torch.testing.assert_close(terms["invariance"], invariance_loss(views, num_global=2))
    torch.testing.assert_close(terms["sigreg"], SIGReg(11, 9, 2.0)(views, step=4))
    torch.testing.assert_close(terms["loss"], 0.7 * terms["invariance"] + 0.3 * terms["sigreg"])


@pytest.mark.parametrize(("weight", "remaining"), [(0.0, "invariance"), (1.0, "sigreg")])
def test_extreme_weights_leave_one_term(weight: float, remaining: str) -> None:
    terms = LeJEPALoss(SIGReg(11), weight)(projections(), num_global=2, step=0)
    torch.testing.assert_close(terms["loss"], terms[remaining])


def test_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    views = projections()[:, :, :2].clone().requires_grad_()
    loss = LeJEPALoss(SIGReg(3), 0.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, num_global=2, step=1)["loss"], views)


def test_bfloat16_projections_are_compared_in_float32() -> None:
    views = projections().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = LeJEPALoss(SIGReg(11), 0.02)(views, num_global=2, step=0)
    exact = LeJEPALoss(SIGReg(11), 0.02)(views.float(), num_global=2, step=0)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 0, 7)])
def test_projections_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"projections must have shape \(V, N, K\) with samples, got \(5, "):
        invariance_loss(torch.zeros(shape), num_global=2)


@pytest.mark.parametrize("num_global", [0, 6])
def test_impossible_numbers_of_global_views_are_refused(num_global: int) -> None:
    with pytest.raises(
        ValueError, match=rf"num_global must be 1 to the number of views 5, got {num_global}\."
    ):
        invariance_loss(projections(), num_global)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_outside_the_unit_interval_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"regularizer_weight must lie in \[0, 1\], got {weight}\."):
        LeJEPALoss(SIGReg(), weight)
