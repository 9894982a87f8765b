"""SIGReg against its equation, written as a loop over complex exponentials and all knots."""

import math

import pytest
import torch

from common.losses.sigreg import SIGReg, unit_directions

# V views, N samples, K features, M directions: all different
V, N, K, M = 3, 11, 7, 5


def projections(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.7 * torch.randn(V, N, K, generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def sigreg_by_loop(
    samples: torch.Tensor, step: int, num_directions: int, num_knots: int, t_max: float
) -> float:
    """Sum over views, directions and every knot of both signs, with complex exponentials in float64."""
    directions = unit_directions(samples.shape[-1], num_directions, step, torch.float64)
    knots = [-t_max + 2 * t_max * j / (num_knots - 1) for j in range(num_knots)]
    values = []
    for view in samples.double():
        for direction in directions.T:
            integrand = []
            for t in knots:
                characteristic = sum(torch.exp(1j * t * (sample @ direction)) for sample in view) / len(view)
                gaussian = math.exp(-(t**2) / 2)
                integrand.append(float((characteristic - gaussian).abs() ** 2) * gaussian)
            steps = zip(knots, knots[1:], integrand, integrand[1:], strict=False)
            values.append(len(view) * sum((right - left) * (f + g) / 2 for left, right, f, g in steps))
    return sum(values) / len(values)


@pytest.mark.parametrize(("num_knots", "t_max"), [(17, 3.0), (2, 3.0), (3, 1.0), (4, 2.0), (33, 3.0)])
def test_sigreg_is_the_trapezoid_sum_over_all_knots_of_both_signs(num_knots: int, t_max: float) -> None:
    samples = projections()
    expected = sigreg_by_loop(samples, 5, M, num_knots, t_max)
    value = SIGReg(M, num_knots, t_max)(samples, step=5)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_sigreg_in_float32_is_close_to_float64_in_value_and_gradient(scale: float) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(1)
        samples = (scale * torch.randn(2, 67, 31, generator=generator, dtype=torch.float64)).to(dtype)
        samples.requires_grad_()
        value = SIGReg(num_directions=53)(samples, step=3)
        results.append((value.detach().double(), *torch.autograd.grad(value, samples)))
    (value, gradient), (exact_value, exact_gradient) = results
    assert float((value - exact_value).abs() / exact_value) < 2e-6
    assert float((gradient.double() - exact_gradient).norm() / exact_gradient.norm()) < 5e-6


def test_gradient_of_sigreg_is_that_of_finite_differences() -> None:
    samples = projections()[:2, :5, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SIGReg(num_directions=M)(x, step=2), samples)


def test_collapsed_batch_at_one_positive_knot_has_the_value_by_hand() -> None:
    # knots -1, 0, 1: N times the step 1 times (1 - e^(-1/2))^2 e^(-1/2) = 0.393469^2 * 0.606531
    value = SIGReg(num_directions=M, num_knots=3, t_max=1.0)(
        torch.zeros(V, N, K, dtype=torch.float64), step=0
    )
    assert float(value) == pytest.approx(N * 0.0939019, rel=1e-6)


def test_collapsed_batch_is_close_to_the_closed_integral() -> None:
    # the integral over all t of (1 - g)^2 g = g - 2 g^2 + g^3 with g = e^(-t^2 / 2); many far knots reach it
    integral = math.sqrt(2 * math.pi) * (1 - 2 / math.sqrt(2) + 1 / math.sqrt(3))
    value = SIGReg(num_directions=M, num_knots=201, t_max=10.0)(
        torch.zeros(V, N, K, dtype=torch.float64), step=0
    )
    assert float(value) == pytest.approx(N * integral, rel=1e-9)


def test_two_opposite_points_on_a_line_have_the_value_by_hand() -> None:
    # with K = 1 every direction is +-1, and the characteristic function of {x, -x} is cos(t x)
    x = 0.8
    f = {t: (math.cos(t * x) - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2) for t in (1.5, 3.0)}
    samples = torch.tensor([[[x], [-x]]], dtype=torch.float64)
    value = SIGReg(num_directions=M, num_knots=5, t_max=3.0)(samples, step=0)
    assert float(value) == pytest.approx(2 * 1.5 * (2 * f[1.5] + f[3.0]), rel=1e-12)


def test_sigreg_is_smallest_for_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 512, 16, generator=generator)
    values = {scale: float(SIGReg()(scale * normal, step=0)) for scale in (0.0, 0.5, 1.0, 2.0, 3.0)}
    assert min(values, key=values.get) == 1.0
    assert float(SIGReg()(normal + 1, step=0)) > 10 * values[1.0]


def test_views_are_averaged_and_samples_are_exchangeable() -> None:
    samples = projections()
    sigreg = SIGReg(M)
    by_view = torch.stack([sigreg(view[None], step=4) for view in samples])
    torch.testing.assert_close(sigreg(samples, step=4), by_view.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigreg(samples.flip(1), step=4), sigreg(samples, step=4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigreg_under_autocast_is_the_float32_value(dtype: torch.dtype) -> None:
    samples = projections(dtype=dtype)
    sigreg = SIGReg(num_directions=97)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = sigreg(samples, step=1)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, sigreg(samples.float(), step=1), rtol=0, atol=0)


def test_directions_depend_on_the_step_alone() -> None:
    torch.manual_seed(1)
    first = unit_directions(K, M, step=9)
    torch.manual_seed(2)
    torch.rand(3)
    torch.testing.assert_close(unit_directions(K, M, step=9), first, rtol=0, atol=0)
    assert not torch.isclose(unit_directions(K, M, step=10), first).any()


def test_drawing_directions_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    SIGReg(M)(projections(), step=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_directions_are_uniform_on_the_sphere() -> None:
    directions = unit_directions(K, 40_000, step=0, dtype=torch.float64)
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(40_000, dtype=torch.float64))
    torch.testing.assert_close(directions.mean(1), torch.zeros(K, dtype=torch.float64), rtol=0, atol=0.01)
    covariance = directions @ directions.T / 40_000
    torch.testing.assert_close(covariance, torch.eye(K, dtype=torch.float64) / K, rtol=0, atol=0.01)


def test_directions_in_float64_are_those_of_float32() -> None:
    exact = unit_directions(K, M, step=6, dtype=torch.float64)
    torch.testing.assert_close(unit_directions(K, M, step=6), exact.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_sigreg_on_the_gpu_is_that_on_the_cpu() -> None:
    samples = projections(dtype=torch.float32)
    on_gpu = SIGReg(M)(samples.cuda(), step=1)
    torch.testing.assert_close(on_gpu.cpu(), SIGReg(M)(samples, step=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_directions": 0}, r"num_directions must be at least 1, got 0\."),
        ({"num_knots": 1}, r"num_knots must be at least 2, got 1\."),
        ({"t_max": 0.0}, r"t_max must be positive, got 0\.0\."),
        ({"t_max": math.nan}, r"t_max must be positive, got nan\."),
    ],
)
def test_impossible_quadratures_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SIGReg(**arguments)


@pytest.mark.parametrize("shape", [(7,), (3, 0, 7)])
def test_projections_without_samples_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"projections must have shape \(\.\.\., N, K\) with samples, got \("
    ):
        SIGReg()(torch.zeros(shape), step=0)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step must not be negative, got -1\."):
        SIGReg()(projections(), step=-1)
