import numpy as np
from matplotlib.figure import Figure

from common.cohort.targets import Target
from common.reports import target_pictures
from common.reports.target_pictures import TargetResult, draw_target


def test_tertiles_are_cut_at_the_risks_of_the_training_volumes(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(target_pictures, "write_figure", lambda _, figure: drawn.append(figure))
    truth = np.array([[1, 1], [2, 0], [3, 1], [4, 1], [5, 0]], float)
    tested = TargetResult(
        target=Target("death", "survival", {}),
        volumes=list("abcde"),
        truth=truth,
        predicted={"drawn": np.array([5.0, 5, 1, 1, 1])},  # two above all training volumes but one, three low
        trained=np.arange(7.0),
        metrics={"drawn": {"c_index": np.array([0.75, 0.6, 0.9])}},
    )
    draw_target(tmp_path / "death.png", tested, "drawn")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "low risk: 3, 2 events",
        "high risk: 2, 1 events",
    ]
    low = axes.get_lines()[0]
    assert low.get_xdata().tolist() == [0, 3, 4, 5]
    np.testing.assert_allclose(low.get_ydata(), [1, 2 / 3, 1 / 3, 1 / 3])
    assert "c index 0.750" in axes.get_title()
