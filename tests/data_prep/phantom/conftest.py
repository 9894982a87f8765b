"""Patients drawn without a scanner."""

import numpy as np

from data_prep.phantom.anatomy import TS_IDS, Anatomy
from data_prep.phantom.body import draw_body, draw_skeleton
from data_prep.phantom.canvas import Canvas
from data_prep.phantom.grid import Grid, Pose
from data_prep.phantom.organs import draw_abdomen, draw_mediastinum

UPRIGHT = Pose((0.0, 0.0), 0.0, (1.0, 1.0, 1.0))


def draw_inside(grid: Grid, anatomy: Anatomy) -> Canvas:
    """Body, skeleton and organs, without lungs and airways."""
    canvas = Canvas(grid)
    abdomen = draw_body(canvas, anatomy)
    draw_skeleton(canvas, anatomy)
    draw_abdomen(canvas, anatomy, abdomen)
    draw_mediastinum(canvas, anatomy)
    return canvas


def center(canvas: Canvas, name: str) -> np.ndarray:
    """Mean (x, y, z) of a structure in patient mm."""
    z, y, x = np.nonzero(canvas.labels == TS_IDS[name])
    assert len(z), name
    return np.array([canvas.grid.x[y, x].mean(), canvas.grid.y[y, x].mean(), canvas.grid.z[z].mean()])
