"""LeJEPA's loss against its equation, and SIGReg against loops over complex exponentials and all knots."""

import math
import shutil

import numpy as np
import pytest
import torch

from common.losses.lejepa import LeJEPALoss, SIGReg, invariance_loss, unit_directions

# V views, N samples, K features, M directions: all different
V, N, K, M = 3, 11, 7, 5


def projections(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.7 * torch.randn(V, N, K, generator=generator, dtype=torch.float64) + 0.3).to(dtype)


def sigreg(
    num_directions: int = M, num_knots: int = 17, t_max: float = 3.0, compiled: bool = False
) -> SIGReg:
    return SIGReg(num_directions, num_knots, t_max, compiled)


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


def value_and_gradient_in_float64(
    samples: np.ndarray, directions: np.ndarray, num_knots: int, t_max: float
) -> tuple[float, np.ndarray]:
    """Differentiate the sum over all knots of both signs by hand: d|f - g|^2 = 2 Re((f - g)* df)."""
    views, num_samples, _ = samples.shape
    knots, step = np.linspace(-t_max, t_max, num_knots, retstep=True)
    gaussian = np.exp(-(knots**2) / 2)
    weights = step * np.where(abs(knots) == t_max, 0.5, 1) * gaussian
    exponentials = np.exp(1j * (samples @ directions)[..., None] * knots)  # V, N, M, knots
    difference = exponentials.mean(1, keepdims=True) - gaussian
    value = num_samples * (weights * abs(difference) ** 2).sum(-1).mean()
    slopes = (weights * 2 * (difference.conj() * 1j * knots * exponentials).real).sum(-1)
    return float(value), slopes @ directions.T / (views * directions.shape[-1])


@pytest.mark.parametrize(
    ("num_knots", "t_max"), [(17, 3.0), (17, 5.0), (2, 3.0), (3, 1.0), (4, 2.0), (33, 3.0), (33, 5.0)]
)
def test_sigreg_is_the_trapezoid_sum_over_all_knots_of_both_signs(num_knots: int, t_max: float) -> None:
    samples = projections()
    expected = sigreg_by_loop(samples, 5, M, num_knots, t_max)
    value = sigreg(M, num_knots, t_max)(samples, step=5)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num_knots", "t_max"), [(17, 3.0), (17, 5.0), (33, 3.0), (8, 3.0)])
@pytest.mark.parametrize(
    ("num_samples", "scale"), [(1, 1.0), (67, 0.01), (67, 0.3), (67, 1.0), (67, 4.0), (512, 1.0), (2048, 1.0)]
)
def test_sigreg_is_exact_in_value_and_gradient(
    num_samples: int, scale: float, num_knots: int, t_max: float
) -> None:
    exact_samples = scale * np.random.default_rng(1).standard_normal((2, num_samples, 31))
    exact_samples = exact_samples.astype(np.float32).astype(np.float64)
    directions = unit_directions(31, 53, 3, torch.float64).numpy()
    exact_value, exact_gradient = value_and_gradient_in_float64(exact_samples, directions, num_knots, t_max)
    for dtype, value_error, gradient_error in (
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 1e-6, 5e-6),
    ):
        samples = torch.tensor(exact_samples, dtype=dtype, requires_grad=True)
        value = sigreg(53, num_knots, t_max)(samples, step=3)
        (gradient,) = torch.autograd.grad(value, samples)
        assert value.dtype == gradient.dtype == dtype
        assert float(value.detach()) == pytest.approx(exact_value, rel=value_error)
        error = np.linalg.norm(gradient.double().numpy() - exact_gradient) / np.linalg.norm(exact_gradient)
        assert error < gradient_error


def test_gradient_of_sigreg_is_that_of_finite_differences() -> None:
    samples = projections()[:2, :5, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sigreg()(x, step=2), samples)


def test_gradient_is_scaled_by_what_follows_and_can_be_computed_again() -> None:
    samples = projections().requires_grad_()
    value = sigreg()(samples, step=2)
    (expected,) = torch.autograd.grad(value, samples, retain_graph=True)
    (threefold,) = torch.autograd.grad(3 * value, samples, retain_graph=True)
    (again,) = torch.autograd.grad(value, samples)
    torch.testing.assert_close(threefold, 3 * expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layout_in_memory_makes_no_difference(layout: str) -> None:
    whole = projections()
    samples = {
        "transposed": whole.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": whole.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": whole[:1].expand(V, N, K),
    }[layout].requires_grad_()
    assert not samples.is_contiguous()
    contiguous = samples.detach().contiguous().requires_grad_()
    results = []
    for given in (samples, contiguous):
        value = sigreg()(given, step=2)
        results.append((value, *torch.autograd.grad(value, given)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=1e-16)


def test_any_number_of_leading_axes_is_averaged() -> None:
    samples = projections()
    expected = sigreg()(samples, step=4)
    torch.testing.assert_close(sigreg()(samples.reshape(1, V, N, K), step=4), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(sigreg()(samples[0], step=4), sigreg()(samples[:1], step=4), rtol=0, atol=0)


def test_only_one_number_per_sample_and_direction_is_kept_for_the_gradient() -> None:
    num_samples, num_knots = 401, 17
    samples = torch.randn(V, num_samples, K, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sigreg(num_knots=num_knots)(samples, step=0)
    angles = V * num_samples * M
    table = (num_knots // 2) * 2 * M * V
    inputs = samples.numel() + K * M
    assert angles <= sum(tensor.numel() for tensor in kept) <= angles + table + inputs


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_sigreg_is_the_same() -> None:
    # another number of samples is compiled anew, for any number of them
    for num_samples in (N, N + 6, N + 9):
        samples = torch.randn(V, num_samples, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
        results = []
        for compiled in (False, True):
            value = sigreg(num_knots=7, compiled=compiled)(samples, step=3)
            results.append((value, *torch.autograd.grad(value, samples)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_collapsed_batch_is_close_to_the_closed_integral() -> None:
    # the integral over all t of (1 - g)^2 g = g - 2 g^2 + g^3 with g = e^(-t^2 / 2); many far knots reach it
    integral = math.sqrt(2 * math.pi) * (1 - 2 / math.sqrt(2) + 1 / math.sqrt(3))
    value = sigreg(num_knots=201, t_max=10.0)(torch.zeros(V, N, K, dtype=torch.float64), step=0)
    assert float(value) == pytest.approx(N * integral, rel=1e-9)


def test_two_opposite_points_on_a_line_have_the_value_by_hand() -> None:
    # with K = 1 every direction is +-1, and the characteristic function of {x, -x} is cos(t x)
    x = 0.8
    f = {t: (math.cos(t * x) - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2) for t in (1.5, 3.0)}
    samples = torch.tensor([[[x], [-x]]], dtype=torch.float64)
    value = sigreg(num_knots=5, t_max=3.0)(samples, step=0)
    assert float(value) == pytest.approx(2 * 1.5 * (2 * f[1.5] + f[3.0]), rel=1e-12)


def test_sigreg_is_smallest_for_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 512, 16, generator=generator)
    values = {scale: float(sigreg(1024)(scale * normal, step=0)) for scale in (0.0, 0.5, 1.0, 2.0, 3.0)}
    assert min(values, key=values.get) == 1.0
    assert float(sigreg(1024)(normal + 1, step=0)) > 10 * values[1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sigreg_under_autocast_is_the_float32_value(dtype: torch.dtype) -> None:
    samples = projections(dtype=dtype).requires_grad_()
    exact_samples = samples.detach().float().requires_grad_()
    regularizer = sigreg(97)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = regularizer(samples, step=1)
    exact = regularizer(exact_samples, step=1)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, exact, rtol=0, atol=0)
    under_autocast.backward()
    exact.backward()
    torch.testing.assert_close(samples.grad, exact_samples.grad.to(dtype), rtol=0, atol=0)


def test_directions_depend_on_the_step_alone() -> None:
    torch.manual_seed(1)
    first = unit_directions(K, M, step=9)
    torch.manual_seed(2)
    torch.rand(3)
    torch.testing.assert_close(unit_directions(K, M, step=9), first, rtol=0, atol=0)
    assert not torch.isclose(unit_directions(K, M, step=10), first).any()


def test_drawing_directions_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    sigreg()(projections(), step=3)
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
@pytest.mark.parametrize("compiled", [False, True])
def test_sigreg_on_the_gpu_is_that_on_the_cpu(compiled: bool) -> None:
    results = []
    for device in ("cuda", "cpu"):
        samples = projections(dtype=torch.float32).to(device).requires_grad_()
        value = sigreg(compiled=compiled and device == "cuda")(samples, step=1)
        (gradient,) = torch.autograd.grad(value, samples)
        results.append((value.cpu(), gradient.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


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
        sigreg(**arguments)


@pytest.mark.parametrize("shape", [(7,), (3, 0, 7)])
def test_projections_without_samples_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"projections must have shape \(\.\.\., N, K\) with samples, got \("
    ):
        sigreg()(torch.zeros(shape), step=0)


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"step must not be negative, got -1\."):
        sigreg()(projections(), step=-1)


@pytest.mark.parametrize("num_global", [1, 2, 3])
def test_invariance_is_the_mean_squared_distance_to_the_centre_of_the_global_views(num_global: int) -> None:
    views = projections()
    total = 0.0
    for sample in range(N):
        for feature in range(K):
            centre = sum(float(views[view, sample, feature]) for view in range(num_global)) / num_global
            total += sum((centre - float(views[view, sample, feature])) ** 2 for view in range(V))
    assert float(invariance_loss(views, num_global)) == pytest.approx(total / (V * N * K), rel=1e-12)


def test_gradient_reaches_views_and_centre() -> None:
    views = projections().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: invariance_loss(x, num_global=2), views)
    # moving all views alike changes nothing: with a detached centre the gradients would not cancel
    (gradient,) = torch.autograd.grad(invariance_loss(views, num_global=2), views)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(N, K, dtype=torch.float64))


def test_loss_weighs_invariance_and_sigreg_as_equation_1() -> None:
    views = projections()
    terms = LeJEPALoss(sigreg(11, 9, 2.0), 0.3)(views, num_global=2, step=4)
    assert terms.keys() == {"loss", "invariance", "sigreg"}
    torch.testing.assert_close(terms["invariance"], invariance_loss(views, num_global=2))
    torch.testing.assert_close(terms["sigreg"], sigreg(11, 9, 2.0)(views, step=4))
    torch.testing.assert_close(terms["loss"], 0.7 * terms["invariance"] + 0.3 * terms["sigreg"])


def test_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    views = projections()[:, :, :2].clone().requires_grad_()
    loss = LeJEPALoss(sigreg(3), 0.5)
    assert torch.autograd.gradcheck(lambda x: loss(x, num_global=2, step=1)["loss"], views)


def test_bfloat16_projections_are_compared_in_float32() -> None:
    views = projections().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = LeJEPALoss(sigreg(11), 0.02)(views, num_global=2, step=0)
    exact = LeJEPALoss(sigreg(11), 0.02)(views.float(), num_global=2, step=0)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 7), (3, 0, 7)])
def test_projections_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"projections must have shape \(V, N, K\) with samples, got \(3, "):
        invariance_loss(torch.zeros(shape), num_global=2)


@pytest.mark.parametrize("num_global", [0, 4])
def test_impossible_numbers_of_global_views_are_refused(num_global: int) -> None:
    with pytest.raises(ValueError, match=rf"num_global must be 1 to .* 3, got {num_global}\."):
        invariance_loss(projections(), num_global)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_outside_the_unit_interval_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"sigreg_weight must lie in \[0, 1\], got {weight}\."):
        LeJEPALoss(sigreg(), weight)
