import numpy as np
import pytest

from common.metrics.gap_curve import gap_curve, matched_slices


def test_an_arc_has_the_distances_of_its_angles() -> None:
    angle = np.linspace(0, 2, 41)  # 0.05 rad every 2 mm
    curve = gap_curve(np.stack([np.cos(angle), np.sin(angle)], 1), np.arange(41) * 2.0, [2, 6, 20, 70])
    np.testing.assert_allclose(curve, 1 - np.cos(0.025 * np.array([2, 6, 20, 70])), rtol=1e-9)
    geodesic = gap_curve(
        np.stack([np.cos(angle), np.sin(angle)], 1), np.arange(41) * 2.0, [2, 20], "geodesic"
    )
    np.testing.assert_allclose(geodesic, [0.05, 0.5], rtol=1e-9)


def test_a_tangle_is_as_far_from_its_neighbour_as_from_any() -> None:
    tokens = np.random.default_rng(0).standard_normal((600, 50))
    curve = gap_curve(tokens, np.arange(600.0), [1, 10, 100])
    np.testing.assert_allclose(curve, 1, atol=0.03)


def test_partners_are_those_nearest_to_the_gap() -> None:
    rng = np.random.default_rng(2)
    tokens, z_mm = rng.standard_normal((23, 4)), np.cumsum(rng.uniform(1, 4, 23))
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    for gap, found in zip([6.0, 9.0], gap_curve(tokens, z_mm, [6, 9]), strict=True):
        pairs = []
        for s in range(23):
            partner = min(range(23), key=lambda t, s=s, gap=gap: abs(z_mm[t] - z_mm[s] - gap))
            if abs(z_mm[partner] - z_mm[s] - gap) <= 1.5:
                pairs.append(1 - unit[s] @ unit[partner])
        assert found == pytest.approx(np.mean(pairs))


def test_matched_slices_are_the_nearest_to_even_positions() -> None:
    assert matched_slices(np.arange(0, 20, 0.7), 3.5).tolist() == [0, 5, 10, 15, 20, 25]
    assert matched_slices([0, 5, 10], 2).tolist() == [0, 1, 2]
    assert matched_slices([4.0], 2).tolist() == [0]
    z_mm = np.cumsum(np.random.default_rng(0).uniform(0.5, 1, 50))
    expected = {int(np.abs(z_mm - z).argmin()) for z in np.arange(z_mm[0], z_mm[-1], 4)}
    assert set(matched_slices(z_mm, 4).tolist()) == expected


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="step_mm must be positive, got 0"):
        matched_slices([0, 1], 0)
    with pytest.raises(ValueError, match=r"gaps_mm must ascend from above 0, got \[3, 2\]"):
        gap_curve(np.eye(3), [0, 1, 2], [3, 2])
