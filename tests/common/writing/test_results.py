"""The picture of scores; files and rows of a run are in tests/bundles/test_report_runs.py."""

import math

import numpy as np

from common.writing.results import draw_scores


def test_undefined_classes_and_intervals_do_not_stop_the_picture(tmp_path) -> None:
    samples = {name: {"f1": np.random.default_rng(0).random((5, 18))} for name in ("real", "shuffled")}
    samples["real"]["f1"][:, 3] = math.nan
    numbers = {"real": {"macro_f1": (0.5, 0.4, 0.6)}, "shuffled": {"macro_f1": (0.3, math.nan, math.nan)}}
    draw_scores(tmp_path / "new" / "scores.png", numbers, samples, "title")
    assert (tmp_path / "new" / "scores.png").stat().st_size > 10_000
