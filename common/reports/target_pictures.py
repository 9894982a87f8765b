"""Pictures of targets that were read from embeddings: numbers as points, survival as curves of tertiles."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.cohort.targets import NUMBER, SURVIVAL, Target
from common.metrics.bootstrap import interval
from common.metrics.survival import kaplan_meier
from common.reports.slice_grid import PALETTE
from common.run.process import write_figure

FloatArray = NDArray[np.float64]


class TargetResult(NamedTuple):
    """What was predicted of one target.

    Args:
        target: the target.
        volumes: N names of the test volumes.
        truth: ``(N, 1)``; of survival times and events ``(N, 2)``.
        predicted: by encoder or floor, ``(N,)``: scores, numbers or log hazards.
        trained: predictions of the encoder for the training volumes, which set the cuts of a picture.
        metrics: by encoder or floor, metric to its value and those on the resamples, ``(1 + R,)``.
    """

    target: Target
    volumes: list[str]
    truth: FloatArray
    predicted: dict[str, FloatArray]
    trained: FloatArray
    metrics: dict[str, dict[str, FloatArray]]


def draw_target(path: Path, tested: TargetResult, encoder: str) -> None:
    """Draw what an encoder's embeddings tell of one target, with its metrics above.

    Numbers: predicted against true. Survival: Kaplan-Meier curves of the test volumes in the thirds of risk
    that the training volumes set. Labels: the scores of both classes, a step curve each.
    """
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    predicted, truth = tested.predicted[encoder], tested.truth
    if tested.target.kind == NUMBER:
        axes.scatter(truth[:, 0], predicted, s=12, color=PALETTE[0])
        ends = [truth[:, 0].min(), truth[:, 0].max()]
        axes.plot(ends, ends, color="0.6", linewidth=0.8)
        axes.set(xlabel="true", ylabel="predicted")
    elif tested.target.kind == SURVIVAL:
        _draw_tertiles(axes, tested, encoder)
    else:
        for label in (0, 1):
            scores = np.sort(predicted[truth[:, 0] == label])
            shares = np.arange(1, len(scores) + 1) / len(scores)
            axes.step(scores, shares, where="post", color=PALETTE[label], label=f"{label}: {len(scores)}")
        axes.set(xlabel="score", ylabel="share with at most this score")
        axes.legend(frameon=False)
    texts = []
    for name, values in tested.metrics[encoder].items():
        low, high = interval(values[1:])
        texts.append(f"{name.replace('_', ' ')} {values[0]:.3f} ({low:.3f} to {high:.3f})")
    title = f"{tested.target.name}, {encoder}, n = {len(truth)}"
    axes.set_title("\n".join([title, *texts]), fontsize=9)
    write_figure(path, figure)


def _draw_tertiles(axes: Axes, tested: TargetResult, encoder: str) -> None:
    """Draw a curve for each third of risk; a tick where a patient was last seen."""
    thirds = np.digitize(tested.predicted[encoder], np.quantile(tested.trained, [1 / 3, 2 / 3]))
    for third, name in enumerate(("low", "middle", "high")):
        times, events = tested.truth[thirds == third].T
        if not len(times):
            continue
        distinct, shares = kaplan_meier(times, events)
        x, y = np.concatenate([[0], distinct]), np.concatenate([[1], shares])
        label = f"{name} risk: {len(times)}, {int(events.sum())} events"
        axes.step(x, y, where="post", color=PALETTE[third], label=label)
        seen = np.searchsorted(distinct, times[events == 0])
        axes.plot(distinct[seen], shares[seen], "|", color=PALETTE[third])
    axes.set(xlabel="time", ylabel="share without event", ylim=(0, 1.02))
    axes.legend(frameon=False)
