"""The distance to the normal distribution, against SciPy's."""

import numpy as np
import pytest
import torch
from scipy import stats

from common.metrics.gaussianity import kolmogorov_smirnov


def test_every_dimension_has_scipys_statistic():
    rng = np.random.default_rng(0)
    samples = np.stack([rng.normal(0, 1, 57), rng.normal(1, 1, 57), rng.uniform(-1, 4, 57), np.zeros(57)], 1)
    expected = [stats.kstest(column, "norm").statistic for column in samples.T]
    np.testing.assert_allclose(kolmogorov_smirnov(torch.from_numpy(samples)).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("sample", "expected"), [(-9.0, 1.0), (9.0, 1.0), (0.0, 0.5)])
def test_one_sample_has_the_statistic_by_hand_on_either_side(sample, expected):
    assert float(kolmogorov_smirnov(torch.tensor([[sample]]))) == pytest.approx(expected)


def test_a_normal_sample_is_close_and_a_collapsed_one_far():
    generator = torch.Generator().manual_seed(0)
    normal = kolmogorov_smirnov(torch.randn(2000, 3, generator=generator))
    collapsed = kolmogorov_smirnov(0.01 * torch.randn(2000, 3, generator=generator))
    assert normal.max() < 0.04
    assert collapsed.min() > 0.45


def test_samples_must_be_rows():
    with pytest.raises(ValueError, match=r"samples must have shape \(N, K\) with samples, got \(0, 3\)"):
        kolmogorov_smirnov(torch.zeros(0, 3))
