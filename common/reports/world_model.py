"""Pictures of two encoders' latent geometry: continuity by volume, and the world-model probes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.metrics.paired_samples import Comparison, Mean
from common.reports.slice_grid import PALETTE
from common.run.process import write_figure

World = Mapping[str, dict[str, Any]]


def draw_continuity(
    path: str | Path,
    continuity: Mapping[tuple[str, str, str], np.ndarray],
    comparisons: Mapping[str, Comparison],
) -> None:
    """Draw the continuity of each volume by one encoder against the next; above the diagonal the first wins.

    Args:
        path: PNG to write.
        continuity: encoder, sampling and distance to the scores of the volumes.
        comparisons: measure to the paired comparison, in the same order.
    """
    first, second, *_ = dict.fromkeys(encoder for encoder, _, _ in continuity)
    kinds = list(dict.fromkeys((sampling, distance) for _, sampling, distance in continuity))
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    grid = figure.subplots(2, -(-len(kinds) // 2), squeeze=False).ravel()
    for axes, (sampling, distance), comparison in zip(grid, kinds, comparisons.values(), strict=True):
        one, other = continuity[first, sampling, distance], continuity[second, sampling, distance]
        axes.scatter(other, one, s=12, alpha=0.6, color=PALETTE[0], edgecolors="none")
        top = max(np.nanmax(one), np.nanmax(other)) * 1.05
        axes.plot([0, top], [0, top], color="0.6", linewidth=0.8)
        axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel=second, ylabel=first)
        value, low, high = (getattr(comparison.difference, name) for name in ("value", "low", "high"))
        axes.set_title(
            f"{distance}, {sampling} slices\n{value:+.3f} ({low:+.3f} to {high:+.3f}), "
            f"p {comparison.p_permutation:.2g}",
            fontsize=9,
        )
    figure.suptitle("Latent continuity, one point per volume", fontsize=11)
    write_figure(path, figure, dpi=110)


def draw_world_model(path: str | Path, world: World, gaps_mm: Sequence[float]) -> None:
    """Draw every world-model probe, encoders side by side in each panel.

    Args:
        path: PNG to write.
        world: encoder to the results of ``common.engines.world_model``.
        gaps_mm: distances of the distance-gap curve.
    """
    figure = Figure(figsize=(15, 9), layout="constrained")
    positions, order, gaps, directions, spans, strides = figure.subplots(2, 3).ravel()
    _draw_positions(positions, world)
    measures = {"principal axis": "tau_principal_axis", "nearest neighbours": "tau_nearest_neighbours"}
    _draw_measures(order, world, measures)
    order.set(title="Slice order without labels", xlabel="mean |Kendall's tau|", xlim=(0, 1))
    _draw_bands(gaps, gaps_mm, {encoder: results["gap_curve"] for encoder, results in world.items()})
    gaps.set(title="Distance by gap", xlabel="mm between slices", ylabel="mean cosine distance")
    gaps.set_ylim(bottom=0)
    measures = {"effective rank": "effective_rank", "participation ratio": "participation_ratio"}
    _draw_measures(directions, world, measures)
    directions.set(title="Directions in use, all slices", xlabel="directions")
    _draw_spans(spans, world)
    _draw_strides(strides, world)
    for axes in (order, gaps, directions, strides):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    write_figure(path, figure, dpi=100)


def _draw_positions(axes: Axes, world: World) -> None:
    for colour, (encoder, results) in zip(PALETTE, world.items(), strict=False):
        r2, mae = results["r2_mm"], results["mae_mm"]
        points = (results["true_mm"], results["predicted_mm"])
        axes.scatter(*points, s=5, alpha=0.35, color=colour, edgecolors="none")
        label = f"{encoder}: R2 {r2.value:.3f} ({r2.low:.3f}-{r2.high:.3f}),\n"
        label += f"MAE {mae.value:.1f} mm ({mae.low:.1f}-{mae.high:.1f})"
        axes.scatter([], [], color=colour, label=label)
    true = np.concatenate([results["true_mm"] for results in world.values()])
    axes.plot([true.min(), true.max()], [true.min(), true.max()], color="0.4", linewidth=0.8)
    axes.set(title="Position of a slice, read by ridge", xlabel="true mm from the middle")
    axes.set_ylabel("predicted mm")
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def _draw_measures(axes: Axes, world: World, measures: Mapping[str, str]) -> None:
    means = {encoder: [results[key] for key in measures.values()] for encoder, results in world.items()}
    _draw_bars(axes, list(measures), means, {e: [f"{m.value:.2f}" for m in means[e]] for e in means})


def _draw_spans(axes: Axes, world: World) -> None:
    axes.set_title("Organ spans read by ridge: IoU (boundary error in mm)")
    spans = _measured(axes, world, "organ_spans", "dense_labels_dir")
    organs = list(dict.fromkeys(organ for of_encoder in spans.values() for organ in of_encoder))
    means = {encoder: [results[organ]["iou"] for organ in organs] for encoder, results in spans.items()}
    texts = {
        encoder: [f"{results[organ]['boundary_mm'].value:.0f} mm" for organ in organs]
        for encoder, results in spans.items()
    }
    if spans:
        _draw_bars(axes, organs, means, texts)
        axes.set_xlim(0, 1)


def _draw_strides(axes: Axes, world: World) -> None:
    axes.set_title("Abnormalities from every k-th slice")
    shown = _measured(axes, world, "strides", "probe_dirs")
    if shown:
        places = list(next(iter(shown.values())))
        curves = {e: [means["macro_auroc"] for means in strides.values()] for e, strides in shown.items()}
        _draw_bands(axes, places, curves)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set(xlabel="k", ylabel="macro AUROC")


def _measured(axes: Axes, world: World, name: str, knob: str) -> dict[str, dict[Any, Any]]:
    """Results of the encoders that have them; if none has, the panel says which knob was missing."""
    found = {encoder: results[name] for encoder, results in world.items() if name in results}
    if not found:
        axes.text(0.5, 0.5, f"not measured: give {knob}", ha="center", va="center", color="0.5")
        axes.set(xticks=[], yticks=[])
    return found


def _draw_bars(
    axes: Axes, names: Sequence[str], means: Mapping[str, list[Mean]], texts: Mapping[str, list[str]]
) -> None:
    """Bars from the top down, encoders beside each other, with intervals and a text on each bar."""
    height = 0.8 / len(means)
    for number, (colour, (encoder, of_encoder)) in enumerate(zip(PALETTE, means.items(), strict=False)):
        places = np.arange(len(names)) + (number - (len(means) - 1) / 2) * height
        values = [mean.value for mean in of_encoder]
        # an interval need not hold its estimate
        arms = np.array([(m.value - m.low, m.high - m.value) for m in of_encoder]).T.clip(min=0)
        axes.barh(places, values, height * 0.92, color=colour, label=encoder)
        axes.errorbar(values, places, xerr=arms, fmt="none", color="black", capsize=1.5, linewidth=0.8)
        for place, text in zip(places, texts[encoder], strict=True):
            axes.annotate(text, (0, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()


def _draw_bands(axes: Axes, places: Sequence[float], curves: Mapping[str, Sequence[Mean]]) -> None:
    for colour, (encoder, means) in zip(PALETTE, curves.items(), strict=False):
        value, low, high = ([getattr(mean, name) for mean in means] for name in ("value", "low", "high"))
        axes.plot(places, value, marker="o", markersize=4, color=colour, label=encoder)
        axes.fill_between(places, low, high, alpha=0.2, color=colour)
