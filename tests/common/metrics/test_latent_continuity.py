"""The score of Table V, by hand and for paths whose score is known."""

import math

import numpy as np
import pytest

from common.metrics.latent_continuity import DISTANCES, latent_continuity


def arc(steps: int, angle: float) -> np.ndarray:
    angles = np.linspace(0, angle, steps + 1)
    return np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)


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
def test_the_score_is_that_of_the_definition(distance):
    tokens = np.random.default_rng(0).normal(size=(17, 5)) + 1
    assert latent_continuity(tokens, distance) == pytest.approx(by_hand(tokens, distance), rel=1e-9)


def test_distances_of_a_right_angle_by_hand():
    one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    apart = {name: float(distance(one, other)[0]) for name, distance in DISTANCES.items()}
    assert apart == pytest.approx({"cosine": 1.0, "chord": math.sqrt(2), "geodesic": math.pi / 2})


@pytest.mark.parametrize("distance", DISTANCES)
def test_lengths_do_not_count(distance):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(17, 5))
    longer = tokens * rng.uniform(0.1, 9, (17, 1))
    assert latent_continuity(longer, distance) == pytest.approx(latent_continuity(tokens, distance))


def test_a_straight_path_scores_1_along_the_sphere_and_the_number_of_steps_in_the_papers_distance():
    path = arc(steps=20, angle=0.2)
    assert latent_continuity(path, "geodesic") == pytest.approx(1, abs=1e-9)
    assert latent_continuity(path, "cosine") == pytest.approx(20, rel=0.01)
    assert 0.99 < latent_continuity(path, "chord") < 1


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_tangled_path_scores_less_than_a_straight_one(distance):
    straight = arc(steps=20, angle=1.0)
    tangled = straight + np.random.default_rng(0).normal(0, 0.2, straight.shape)
    assert latent_continuity(tangled, distance) < 0.5 * latent_continuity(straight, distance)


@pytest.mark.parametrize("distance", ["chord", "geodesic"])
def test_metrics_never_pass_1(distance):
    rng = np.random.default_rng(0)
    assert max(latent_continuity(rng.normal(size=(9, 4)), distance) for _ in range(200)) <= 1 + 1e-12


@pytest.mark.parametrize("distance", ["cosine", "chord", "geodesic"])
def test_slices_that_are_all_alike_have_no_score(distance):
    assert math.isnan(latent_continuity(np.full((4, 3), 0.1), distance))


@pytest.mark.parametrize(
    ("tokens", "distance", "message"),
    [
        (np.ones((1, 3)), "cosine", r"shape \(S, D\) of at least two slices, got \(1, 3\)"),
        (np.array([[1.0, 0], [0, 0]]), "cosine", "got slice 1 of length 0.0"),
        (np.array([[np.nan, 0], [0, 1]]), "cosine", "got slice 0 of length nan"),
        (np.ones((2, 3)), "manhattan", r"one of \['chord', 'cosine', 'geodesic'\], got 'manhattan'"),
    ],
)
def test_impossible_input_is_refused(tokens, distance, message):
    with pytest.raises(ValueError, match=message):
        latent_continuity(tokens, distance)
