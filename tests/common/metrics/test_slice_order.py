import numpy as np
import pytest

from common.metrics.slice_order import agreement, order_by_nearest_neighbours, order_by_principal_axis


def line(slices: int = 40) -> np.ndarray:
    """A straight line far from the origin, in a direction across it."""
    rng = np.random.default_rng(0)
    base, direction = np.linalg.qr(rng.standard_normal((11, 2)))[0].T
    return 5 * base + np.linspace(-3, 3, slices)[:, None] * direction


def circle(slices: int = 40, share: float = 0.9) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi * share, slices)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def tangle(slices: int = 400) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((slices, 11))


def test_a_line_is_ordered_without_error() -> None:
    assert agreement(order_by_principal_axis(line())) == pytest.approx(1)
    assert agreement(order_by_nearest_neighbours(line())) == pytest.approx(1)


def test_an_open_circle_is_a_path_but_no_axis() -> None:
    # the ends lie nearest to each other after the middle, so that the path begins there and goes once round
    order = order_by_nearest_neighbours(circle(share=0.45))
    assert agreement(order) == pytest.approx(1)
    # on an arc of nine tenths the axis sees both arms over one another: far from the order
    assert agreement(order_by_principal_axis(circle())) < 0.7


def test_a_tangle_has_no_order() -> None:
    assert agreement(order_by_principal_axis(tangle())) < 0.15
    assert agreement(order_by_nearest_neighbours(tangle())) < 0.15


@pytest.mark.parametrize("order", [order_by_principal_axis, order_by_nearest_neighbours])
def test_slices_that_are_all_alike_are_in_no_order(order) -> None:
    assert agreement(order(np.ones((40, 3)))) < 0.3


def test_the_path_visits_the_nearest_slice_left() -> None:
    tokens = np.random.default_rng(4).standard_normal((17, 5))
    order = order_by_nearest_neighbours(tokens).tolist()
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    assert order[0] == (1 - unit @ unit.T).mean(1).argmax()
    for step in range(16):
        left = order[step + 1 :]
        assert order[step + 1] == min(left, key=lambda s, at=order[step]: 1 - unit[at] @ unit[s])


def test_no_order_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"order must hold each of at least two slices once, got \[0, 0, 2\]"
    ):
        agreement([0, 0, 2])
