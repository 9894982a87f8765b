"""Continuity, gap curve and order of slices, by hand and for paths whose scores are known."""

import math

import numpy as np
import pytest

from common.metrics.slice_paths import (
    DISTANCES,
    agreement,
    gap_curve,
    latent_continuity,
    matched_slices,
    order_by_nearest_neighbours,
    order_by_principal_axis,
)


def arc(steps: int, angle: float) -> np.ndarray:
    angles = np.linspace(0, angle, steps + 1)
    return np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)


def line(slices: int = 40) -> np.ndarray:
    """A straight line far from the origin, in a direction across it."""
    base, direction = np.linalg.qr(np.random.default_rng(0).standard_normal((11, 2)))[0].T
    return 5 * base + np.linspace(-3, 3, slices)[:, None] * direction


def tangle(slices: int = 400, width: int = 11) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((slices, width))


def by_hand(tokens: np.ndarray, distance: str) -> float:
    def apart(a: np.ndarray, b: np.ndarray) -> float:
        cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        return {
            "cosine": 1 - cosine,
            "chord": math.sqrt(max(0.0, 2 - 2 * cosine)),
            "geodesic": math.acos(max(-1.0, min(1.0, cosine))),
        }[distance]

    return apart(tokens[0], tokens[-1]) / sum(apart(a, b) for a, b in zip(tokens, tokens[1:], strict=False))


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_score_is_that_of_the_definition_whatever_the_lengths(distance):
    tokens = tangle(17, 5) + 1
    assert latent_continuity(tokens, distance) == pytest.approx(by_hand(tokens, distance), rel=1e-9)
    longer = tokens * np.random.default_rng(0).uniform(0.1, 9, (17, 1))
    assert latent_continuity(longer, distance) == pytest.approx(latent_continuity(tokens, distance))


def test_distances_of_a_right_angle_by_hand():
    one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    apart = {name: float(distance(one, other)[0]) for name, distance in DISTANCES.items()}
    assert apart == pytest.approx({"cosine": 1.0, "chord": math.sqrt(2), "geodesic": math.pi / 2})


def test_a_straight_path_scores_1_along_the_sphere_and_the_number_of_steps_in_the_papers_distance():
    path = arc(steps=20, angle=0.2)
    assert latent_continuity(path, "geodesic") == pytest.approx(1, abs=1e-9)
    assert latent_continuity(path, "cosine") == pytest.approx(20, rel=0.01)
    assert 0.99 < latent_continuity(path, "chord") < 1


@pytest.mark.parametrize("distance", DISTANCES)
def test_slices_that_are_all_alike_have_no_score(distance):
    assert math.isnan(latent_continuity(np.full((4, 3), 0.1), distance))


@pytest.mark.parametrize(
    ("tokens", "distance", "message"),
    [
        (np.ones((1, 3)), "cosine", r"embeddings .*\(S, D\).* got \(1, 3\)"),
        (np.array([[1.0, 0], [0, 0]]), "cosine", "got slice 1 of length 0.0"),
        (np.array([[np.nan, 0], [0, 1]]), "cosine", "got slice 0 of length nan"),
        (np.ones((2, 3)), "manhattan", r"one of \['chord', 'cosine', 'geodesic'\], got 'manhattan'"),
    ],
)
def test_impossible_embeddings_are_refused(tokens, distance, message):
    with pytest.raises(ValueError, match=message):
        latent_continuity(tokens, distance)


def test_an_arc_has_the_distances_of_its_angles():
    tokens, z_mm = arc(steps=40, angle=2), np.arange(41) * 2.0  # 0.05 rad every 2 mm
    curve = gap_curve(tokens, z_mm, [2, 6, 20, 70])
    np.testing.assert_allclose(curve, 1 - np.cos(0.025 * np.array([2, 6, 20, 70])), rtol=1e-9)
    np.testing.assert_allclose(gap_curve(tokens, z_mm, [2, 20], "geodesic"), [0.05, 0.5], rtol=1e-9)


def test_a_tangle_is_as_far_from_its_neighbour_as_from_any():
    np.testing.assert_allclose(gap_curve(tangle(600, 50), np.arange(600.0), [1, 10, 100]), 1, atol=0.03)


def test_partners_are_those_nearest_to_the_gap():
    tokens, z_mm = tangle(23, 4), np.cumsum(np.random.default_rng(2).uniform(1, 4, 23))
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    for gap, found in zip([6.0, 9.0], gap_curve(tokens, z_mm, [6, 9]), strict=True):
        pairs = []
        for s in range(23):
            partner = min(range(23), key=lambda t, s=s, gap=gap: abs(z_mm[t] - z_mm[s] - gap))
            if abs(z_mm[partner] - z_mm[s] - gap) <= 1.5:
                pairs.append(1 - unit[s] @ unit[partner])
        assert found == pytest.approx(np.mean(pairs))


def test_matched_slices_are_the_nearest_to_even_positions():
    assert matched_slices(np.arange(0, 20, 0.7), 3.5).tolist() == [0, 5, 10, 15, 20, 25]
    assert matched_slices([0, 5, 10], 2).tolist() == [0, 1, 2]
    assert matched_slices([4.0], 2).tolist() == [0]
    z_mm = np.cumsum(np.random.default_rng(0).uniform(0.5, 1, 50))
    expected = {int(np.abs(z_mm - z).argmin()) for z in np.arange(z_mm[0], z_mm[-1], 4)}
    assert set(matched_slices(z_mm, 4).tolist()) == expected


@pytest.mark.parametrize("order", [order_by_principal_axis, order_by_nearest_neighbours])
def test_a_line_is_ordered_without_error_and_a_tangle_or_equal_slices_have_no_order(order):
    assert agreement(order(line())) == pytest.approx(1)
    assert agreement(order(tangle())) < 0.15
    assert agreement(order(np.ones((40, 3)))) < 0.3


def test_an_open_circle_is_a_path_but_no_axis():
    # the ends lie nearest to each other after the middle, so that the path begins there and goes once round
    assert agreement(order_by_nearest_neighbours(arc(39, 0.9 * np.pi))) == pytest.approx(1)
    # on an arc of nine tenths the axis sees both arms over one another: far from the order
    assert agreement(order_by_principal_axis(arc(39, 1.8 * np.pi))) < 0.7


def test_the_path_visits_the_nearest_slice_left():
    tokens = tangle(17, 5)
    order = order_by_nearest_neighbours(tokens).tolist()
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert order[0] == (1 - unit @ unit.T).mean(1).argmax()
    for step in range(16):
        left = order[step + 1 :]
        assert order[step + 1] == min(left, key=lambda s, at=order[step]: 1 - unit[at] @ unit[s])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: matched_slices([0, 1], 0), "step_mm must be positive, got 0"),
        (lambda: gap_curve(np.eye(3), [0, 1, 2], [3, 2]), r"gaps_mm .*, got \[3, 2\]"),
        (lambda: agreement([0, 0, 2]), r"order .* once, got \[0, 0, 2\]"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
