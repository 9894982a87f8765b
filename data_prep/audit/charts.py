"""Charts as inline SVG, drawn without scripts, so that a report is one page that opens anywhere."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 300, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 12, 30
NUM_BINS = 24


def histogram(
    values: Sequence[float], title: str, unit: str = "", limits: tuple[float, float] | None = None
) -> str:
    """Draw how often values occur; bars outside the limits are amber.

    Args:
        values: finite.
        title: of the chart.
        unit: of the values.
        limits: least and greatest value of a sound volume.

    Returns:
        A figure of HTML; empty without values.
    """
    if len(values) == 0:
        return ""
    low, high = float(min(values)), float(max(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins=NUM_BINS, range=(low, high))
    return bars(counts.tolist(), edges.tolist(), title, unit, limits)


def bars(
    counts: Sequence[int],
    edges: Sequence[float],
    title: str,
    unit: str = "",
    limits: tuple[float, float] | None = None,
) -> str:
    """Draw a histogram that has been counted.

    Args:
        counts: of each bin.
        edges: of the bins, one more.
        title: of the chart.
        unit: of the edges.
        limits: least and greatest value of a sound volume.

    Returns:
        A figure of HTML.
    """
    inner, floor = WIDTH - _LEFT - _RIGHT, HEIGHT - _BOTTOM
    top = max(*counts, 1)
    step = inner / len(counts)
    shapes = []
    for i, count in enumerate(counts):
        height = count / top * (floor - _TOP)
        sound = limits is None or (edges[i + 1] >= limits[0] and edges[i] <= limits[1])
        shapes.append(
            f'<rect class="{"bar" if sound else "bar out"}" x="{_LEFT + i * step:.1f}" '
            f'y="{floor - height:.1f}" width="{max(step - 1, 0.5):.1f}" height="{height:.1f}"/>'
        )
    middle = (edges[0] + edges[-1]) / 2
    for value, x, anchor in (
        (edges[0], _LEFT, "start"),
        (middle, WIDTH / 2, "middle"),
        (edges[-1], WIDTH - _RIGHT, "end"),
    ):
        shapes.append(f'<text x="{x:g}" y="{floor + 14}" text-anchor="{anchor}">{value:.4g}</text>')
    shapes.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    shapes.append(f'<text x="{_LEFT}" y="9">{top:,}</text>')
    words = escape(f"{title}, {unit}" if unit else title)
    return (
        f'<figure class="chart"><figcaption>{words}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{words}">{"".join(shapes)}</svg></figure>'
    )


def shares(values: Mapping[str, float], title: str) -> str:
    """Draw shares of a whole as horizontal bars with their names and percentages.

    Args:
        values: name to share.
        title: of the chart.

    Returns:
        A figure of HTML; empty without values.
    """
    if not values:
        return ""
    rows = "".join(
        f'<div class="name">{escape(name)}</div>'
        f'<div class="track"><div style="width:{100 * share:.1f}%"></div></div>'
        f'<div class="number">{share:.0%}</div>'
        for name, share in values.items()
    )
    return f'<figure class="shares"><figcaption>{escape(title)}</figcaption><div>{rows}</div></figure>'
