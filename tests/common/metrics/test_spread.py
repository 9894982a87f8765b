"""Effective rank tells a healthy batch from a collapsed one."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.metrics.linear_readout import moments
from common.metrics.spread import (
    covariance_of,
    effective_rank,
    jackknife,
    kolmogorov_smirnov,
    participation_ratio,
    spectral_effective_rank,
)


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


def sums_of(parts: list[np.ndarray]) -> list[np.ndarray]:
    return [moments(part, np.zeros((len(part), 1))).features for part in parts]


def test_both_agree_with_the_spectrum() -> None:
    tokens = np.random.default_rng(1).standard_normal((61, 9)) @ np.diag(np.arange(9) + 0.5)
    values = np.linalg.svd(tokens - tokens.mean(0), compute_uv=False) ** 2
    covariance = np.cov(tokens.T)
    assert participation_ratio(covariance) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    shares = np.sqrt(values) / np.sqrt(values).sum()
    assert spectral_effective_rank(covariance) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert np.isnan(participation_ratio(np.zeros((3, 3))))
    assert np.isnan(spectral_effective_rank(np.zeros((3, 3))))


def test_covariance_of_parts_is_that_of_the_whole() -> None:
    tokens = np.random.default_rng(2).standard_normal((50, 5)) + 9
    np.testing.assert_allclose(
        covariance_of(sums_of([tokens[:7], tokens[7:]])), np.cov(tokens.T, bias=True), atol=1e-9
    )


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(3).standard_normal((12, 1, 1))
    sums = [np.array([[1.0, v], [v, v * v]]) for v in values.ravel()]
    _, error, low, high = jackknife(sums, lambda covariance: float(covariance[0, 0]))
    value, _, _, _ = jackknife(sums, lambda covariance: float(covariance[0, 0]))
    without = [np.var(np.delete(values, i)) for i in range(12)]
    assert value == pytest.approx(np.var(values))
    assert error == pytest.approx(np.sqrt(11 / 12 * ((without - np.mean(without)) ** 2).sum()))
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error))
    with pytest.raises(ValueError, match="sums must be of at least two groups of patients, got 1"):
        jackknife(sums[:1], participation_ratio)


def test_every_dimension_has_scipys_statistic():
    rng = np.random.default_rng(0)
    samples = np.stack([rng.normal(0, 1, 57), rng.normal(1, 1, 57), rng.uniform(-1, 4, 57), np.zeros(57)], 1)
    expected = [stats.kstest(column, "norm").statistic for column in samples.T]
    np.testing.assert_allclose(kolmogorov_smirnov(torch.from_numpy(samples)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("sample", "expected"), [(-9.0, 1.0), (9.0, 1.0), (0.0, 0.5)])
def test_one_sample_has_the_statistic_by_hand_on_either_side(sample, expected):
    assert float(kolmogorov_smirnov(torch.tensor([[sample]]))) == pytest.approx(expected)


def test_samples_must_be_rows():
    with pytest.raises(ValueError, match=r"samples must have shape \(N, K\) with samples, got \(0, 3\)"):
        kolmogorov_smirnov(torch.zeros(0, 3))
