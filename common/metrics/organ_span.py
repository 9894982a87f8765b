"""Where an organ begins and ends along a scan, read from a curve of its share in each slice."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Span = tuple[int, int]
"""First slice, and one past the last."""

SHARES_OF_PEAK = tuple(float(value) for value in np.arange(0.05, 0.96, 0.05).round(2))
"""Thresholds to try, as shares of the curve's maximum. Source: DALE-CT's released organ-span probe."""


class SpanScore(NamedTuple):
    """How a predicted span compares with the true one.

    Args:
        iou: intersection over union of the slices.
        boundary_mm: mean error of the two ends; nan where nothing is predicted.
    """

    iou: float
    boundary_mm: float


def longest_run(present: ArrayLike) -> Span | None:
    """Return the longest run of slices that show the organ; None if no slice does.

    Example:
        >>> longest_run([0, 1, 0, 1, 1, 1, 0])
        (3, 6)
    """
    steps = np.diff(np.concatenate([[0], np.asarray(present, bool).astype(int), [0]]))
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    if len(starts) == 0:
        return None
    longest = int((stops - starts).argmax())
    return int(starts[longest]), int(stops[longest])


def predicted_span(curve: ArrayLike, share_of_peak: float) -> Span | None:
    """Return the longest run of slices whose value is at least a share of the curve's maximum.

    Args:
        curve: predicted share of the organ in each slice; None is returned where it is nowhere above 0.
        share_of_peak: between 0 and 1.

    Example:
        >>> predicted_span([0.0, 0.2, 0.5, 0.4, 0.1], 0.5)
        (2, 4)
    """
    values = np.asarray(curve, np.float64)
    peak = values.max()
    return longest_run(values >= share_of_peak * peak) if peak > 0 else None


def span_score(predicted: Span | None, true: Span, z_mm: ArrayLike) -> SpanScore:
    """Compare a predicted span with the true one, given the position of each slice.

    Example:
        >>> span_score((1, 4), (2, 6), z_mm=range(0, 20, 2))
        SpanScore(iou=0.4, boundary_mm=3.0)
    """
    if predicted is None:
        return SpanScore(0.0, float("nan"))
    place = np.asarray(z_mm, np.float64)
    shared = max(0, min(predicted[1], true[1]) - max(predicted[0], true[0]))
    union = predicted[1] - predicted[0] + true[1] - true[0] - shared
    ends = [
        abs(place[one] - place[other])
        for one, other in ((predicted[0], true[0]), (predicted[1] - 1, true[1] - 1))
    ]
    return SpanScore(shared / union, float(np.mean(ends)))
