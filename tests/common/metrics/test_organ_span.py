import numpy as np
import pytest

from common.metrics.organ_span import longest_run, predicted_span, span_score


@pytest.mark.parametrize(
    ("present", "run"),
    [([0, 0], None), ([1, 1], (0, 2)), ([1, 0, 1, 1, 0, 1, 1], (2, 4)), ([0, 1], (1, 2))],
)
def test_the_longest_run_is_found(present: list[int], run: tuple[int, int] | None) -> None:
    assert longest_run(present) == run


def test_a_bump_is_cut_at_its_share_of_the_peak() -> None:
    z = np.arange(41.0)
    bump = np.maximum(0, 1 - np.abs(z - 20) / 10)  # at or above half its peak from 15 to 25
    assert predicted_span(bump, 0.5) == (15, 26)
    assert predicted_span(7 * bump, 0.5) == (15, 26)
    assert predicted_span(-bump, 0.5) is None


def test_scores_are_those_of_sets_of_slices() -> None:
    z_mm = np.cumsum(np.arange(20.0))
    for predicted, true in (((3, 9), (5, 12)), ((1, 4), (10, 12)), ((2, 8), (2, 8))):
        score = span_score(predicted, true, z_mm)
        one, other = set(range(*predicted)), set(range(*true))
        assert score.iou == pytest.approx(len(one & other) / len(one | other))
        ends = abs(z_mm[min(one)] - z_mm[min(other)]), abs(z_mm[max(one)] - z_mm[max(other)])
        assert score.boundary_mm == pytest.approx(sum(ends) / 2)
    missed = span_score(None, (2, 8), z_mm)
    assert missed.iou == 0
    assert np.isnan(missed.boundary_mm)
