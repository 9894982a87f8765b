import re
from xml.etree import ElementTree

import numpy as np

from data_prep.audit.charts import NUM_BINS, bars, histogram, shares


def heights(figure: str) -> list[float]:
    return [float(height) for height in re.findall(r'<rect [^>]*height="([0-9.]+)"', figure)]


def test_bars_are_as_high_as_there_are_values() -> None:
    values = [0.0] * 6 + [10.0] * 3 + [5.1]
    drawn = heights(histogram(values, "Length", "mm"))
    assert len(drawn) == NUM_BINS
    counts, _ = np.histogram(values, NUM_BINS)
    np.testing.assert_allclose(np.array(drawn) / max(drawn), counts / 6, atol=1e-3)


def test_bars_outside_the_limits_have_another_colour() -> None:
    figure = bars([1, 1, 1, 1], [0, 1, 2, 3, 4], "x", limits=(1.5, 2.5))
    classes = re.findall(r'<rect class="([a-z ]+)"', figure)
    assert classes == ["bar out", "bar", "bar", "bar out"]


def test_one_value_and_none_can_be_drawn() -> None:
    assert sum(height > 0 for height in heights(histogram([3.0, 3.0], "x"))) == 1
    assert histogram([], "x") == ""
    assert shares({}, "x") == ""


def test_titles_and_names_are_escaped() -> None:
    for figure in (histogram([1.0, 2.0], "<b>&", "<i>"), shares({"<script>": 0.25}, "<b>&")):
        ElementTree.fromstring(figure)
        assert "<b>" not in figure
        assert "<script>" not in figure
    assert "25%" in shares({"a": 0.25}, "x")
