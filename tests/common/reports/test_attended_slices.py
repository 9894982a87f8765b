"""The picture shows the slices of largest weight, apart from one another, and says which they are."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.reports.attended_slices import attended_slices, write_attended_slices

Z_MM = 4.0 * np.arange(12)


def test_the_largest_weight_comes_first_and_its_neighbours_do_not() -> None:
    weights = np.array([1, 1, 2, 8, 9, 7, 1, 1, 6, 1, 1, 5]) / 43
    # 3 and 5 lie 4 mm from 4; 11 lies 12 mm from 8
    assert attended_slices(weights, Z_MM, 3) == [4, 8, 11]
    assert attended_slices(weights, 2.5 * Z_MM, 3) == [4, 3, 5]  # 10 mm each


def test_of_few_slices_there_are_few() -> None:
    assert attended_slices(np.array([0.2, 0.5, 0.3]), [0, 1, 2]) == [1]
    assert attended_slices(np.array([0.2, 0.5, 0.3]), [0, 20, 40]) == [1, 2, 0]


def test_slices_of_equal_weight_are_spread_over_the_scan() -> None:
    assert attended_slices(np.full(12, 1 / 12, np.float32), Z_MM) == [1, 3, 5, 7, 9, 11]


def test_the_picture_holds_these_slices_with_place_and_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", kept)
    weights = np.array([0.3, 0.05, 0.05, 0.05, 0.25, 0.05, 0.05, 0.2])
    hu = np.full((8, 20, 20), -1350, np.int16) + 150 * np.arange(8, dtype=np.int16)[:, None, None]
    write_attended_slices(tmp_path / "new" / "a.png", "train_1_a_1", hu, 8.0 * np.arange(8), weights)
    (figure,) = figures
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == [
        "slice 1 of 8, 0.0 mm, weight 30.00%",
        "slice 5 of 8, 32.0 mm, weight 25.00%",
        "slice 8 of 8, 56.0 mm, weight 20.00%",
    ]
    assert "train_1_a_1" in figure.get_suptitle()
    assert "even: 12.50%" in figure.get_suptitle()
    assert [axes.get_images()[0].get_array()[0, 0] for axes in figure.axes[:3]] == [-1350, -750, -300]
    grey = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("L"))
    for expected in (0, 255 * 600 / 1500, 255 * 1050 / 1500):  # -600/1500
        assert (np.abs(grey - expected) < 2).mean() > 0.05
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
