import numpy as np
import pytest
from scipy.stats import sem, wilcoxon

from common.metrics.paired_samples import compare_pairs, mean_over_volumes

ALONE = [f"valid_{n}_a_1" for n in range(30)]


def test_error_of_single_scans_is_the_standard_error_and_the_interval_covers() -> None:
    values = np.random.default_rng(0).standard_normal(30)
    mean = mean_over_volumes([*values, np.nan], [*ALONE, "valid_99_a_1"], 4000, seed=1)
    assert (mean.value, mean.n) == (pytest.approx(values.mean()), 30)
    assert mean.error == pytest.approx(sem(values))
    half = 1.96 * sem(values)
    assert (mean.low, mean.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


def test_scans_of_one_patient_count_as_one() -> None:
    values = np.random.default_rng(0).standard_normal(30)
    single = mean_over_volumes(values, ALONE, 500, seed=1)
    names = [name[:-1] + str(scan) for name in ALONE for scan in (1, 2)]
    doubled = mean_over_volumes(np.repeat(values, 2), names, 500, seed=1)
    assert doubled.error == pytest.approx(single.error)
    assert (doubled.low, doubled.high) == pytest.approx((single.low, single.high))


def test_tests_are_scipys_and_the_exact_permutation() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.standard_normal(9) + 0.5, rng.standard_normal(9)
    found = compare_pairs(one, other, volumes=ALONE[:9], num_resamples=100, seed=0)
    assert found.p_wilcoxon == pytest.approx(wilcoxon(one - other).pvalue)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1).T
    exact = (np.abs(signs @ (one - other)) >= abs((one - other).sum()) - 1e-12).mean()
    assert found.p_permutation == pytest.approx(exact, abs=0.02)
    assert found.difference.value == pytest.approx((one - other).mean())
    assert found.num_patients == 9


def test_pairs_are_patients_and_the_same_encoder_twice_differs_by_nothing() -> None:
    names = ["valid_1_a_1", "valid_1_a_2", "valid_2_a_1", "valid_3_a_1"]
    found = compare_pairs([1, 2, 3, 4], [1, 2, 3, 4], volumes=names, num_resamples=50, seed=0)
    assert (found.difference.value, found.p_wilcoxon, found.p_permutation) == (0, 1, 1)
    assert found.num_patients == 3


def test_nothing_defined_gives_nan_and_lengths_must_agree() -> None:
    assert np.isnan(mean_over_volumes([np.nan], ["valid_1_a_1"], 10, 0).value)
    found = compare_pairs([np.nan], [1], volumes=["valid_1_a_1"], num_resamples=10, seed=0)
    assert np.isnan(found.p_wilcoxon)
    with pytest.raises(ValueError, match=r"values .* \(2,\) .* got \(3,\)"):
        mean_over_volumes([1, 2, 3], ["valid_1_a_1", "valid_2_a_1"], 10, 0)
