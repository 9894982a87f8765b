from pathlib import Path

import numpy as np
from PIL import Image

from common.metrics.paired_samples import Comparison, Mean
from common.reports.world_model import draw_continuity, draw_world_model

MEAN = Mean(0.5, 0.1, 0.4, 0.6, 9)


def world(**more: object) -> dict[str, object]:
    names = ("r2_mm", "mae_mm", "tau_principal_axis", "tau_nearest_neighbours", "effective_rank")
    places = np.linspace(-90, 90, 31)
    return {
        **dict.fromkeys((*names, "participation_ratio"), MEAN),
        "gap_curve": [MEAN, Mean(0.7, 0.1, np.nan, np.nan, 0)],
        "predicted_mm": places + 3,
        "true_mm": places,
        **more,
    }


def brightness(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"), float)


def test_panels_that_were_not_measured_say_so_and_others_are_drawn(tmp_path: Path) -> None:
    measured = {
        "organ_spans": {"heart": {"iou": MEAN, "boundary_mm": MEAN, "miss_rate": MEAN}},
        "strides": {1: {"macro_auroc": MEAN}, 2: {"macro_auroc": MEAN}},
    }
    draw_world_model(tmp_path / "bare.png", {"a": world(), "b": world()}, [5, 10])
    draw_world_model(tmp_path / "whole.png", {"a": world(**measured), "b": world(**measured)}, [5, 10])
    bare, whole = brightness(tmp_path / "bare.png"), brightness(tmp_path / "whole.png")
    assert bare.shape == whole.shape
    lower, half = slice(bare.shape[0] // 2, None), bare.shape[1] // 3
    ink = [(picture[lower, half:] < 200).mean() for picture in (bare, whole)]
    assert ink[1] > 2 * ink[0]


def test_continuity_has_a_panel_a_distance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = [(sampling, distance) for sampling in ("stored", "matched") for distance in ("cosine", "chord")]
    scores = {(encoder, *kind): rng.random(9) for encoder in ("a", "b") for kind in kinds}
    comparisons = {"-".join(kind): Comparison(MEAN, 0.01, 0.02, 9) for kind in kinds}
    draw_continuity(tmp_path / "a.png", scores, comparisons)
    blue = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), int)
    points = (blue[..., 2] - blue[..., 0] > 60).any(0)
    halves = points[: len(points) // 2], points[len(points) // 2 :]
    assert all(half.any() for half in halves)
