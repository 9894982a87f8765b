"""Pictures of two encoders' latent geometry: continuity by volume, and the world-model probes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.metrics.paired_samples import Comparison, Mean
from common.run.atomic_file import atomic_file

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")


def draw_continuity(
    path: str | Path,
    continuity: Mapping[tuple[str, str, str], np.ndarray],
    comparisons: Mapping[str, Comparison],
) -> None:
    """Draw the continuity of each volume by one encoder against the other; above the diagonal the first wins.

    Args:
        path: PNG to write.
        continuity: encoder, sampling and distance to scores of the volumes.
        comparisons: measure to the paired comparison.
    """
    first, second = dict.fromkeys(encoder for encoder, _, _ in continuity)
    kinds = list(dict.fromkeys((sampling, distance) for _, sampling, distance in continuity))
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    grid = figure.subplots(2, -(-len(kinds) // 2), squeeze=False).ravel()
    for axes, (sampling, distance), comparison in zip(grid, kinds, comparisons.values(), strict=True):
        one, other = continuity[first, sampling, distance], continuity[second, sampling, distance]
        axes.scatter(other, one, s=12, alpha=0.6, color=COLOURS[0], edgecolors="none")
        top = max(np.nanmax(one), np.nanmax(other)) * 1.05
        axes.plot([0, top], [0, top], color="0.6", linewidth=0.8)
        axes.set(xlim=(0, top), ylim=(0, top), aspect="equal")
        axes.set_xlabel(second)
        axes.set_ylabel(first)
        difference = comparison.difference
        axes.set_title(
            f"{distance}, {sampling} slices\n{difference.value:+.3f} ({difference.low:+.3f} to "
            f"{difference.high:+.3f}), p {comparison.p_permutation:.2g}",
            fontsize=9,
        )
    figure.suptitle("Latent continuity, a point a volume", fontsize=11)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_world_model(path: str | Path, world: Mapping[str, dict[str, Any]], gaps_mm: Sequence[float]) -> None:
    """Draw every world-model probe, encoders side by side in each panel.

    Args:
        path: PNG to write.
        world: encoder to the results of ``common.engines.world_model``, and "organ_spans" and "strides" where
            they were measured.
        gaps_mm: of the distance-gap curve.
    """
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    _draw_positions(panels[0], world)
    _draw_bars(
        panels[1],
        world,
        {"principal axis": "tau_principal_axis", "nearest neighbours": "tau_nearest_neighbours"},
    )
    panels[1].set(title="Slice order without labels", ylabel="mean |Kendall's tau|", ylim=(0, 1))
    for colour, (encoder, results) in zip(COLOURS, world.items(), strict=False):
        _draw_band(panels[2], gaps_mm, results["gap_curve"], encoder, colour)
    panels[2].set(title="Distance by gap", xlabel="mm between slices", ylabel="mean cosine distance")
    panels[2].set_ylim(bottom=0)
    _draw_bars(
        panels[3],
        world,
        {"effective rank": "effective_rank", "participation ratio": "participation_ratio"},
    )
    panels[3].set(title="Directions in use, all slices", ylabel="directions")
    _draw_spans(panels[4], world)
    _draw_strides(panels[5], world)
    for axes in (*panels[1:4], panels[5]):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    panels[3].margins(y=0.3)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=100)


def _draw_positions(axes: Axes, world: Mapping[str, dict[str, Any]]) -> None:
    for colour, (encoder, results) in zip(COLOURS, world.items(), strict=False):
        r2, mae = results["r2_mm"], results["mae_mm"]
        label = (
            f"{encoder}: R2 {r2.value:.3f} ({r2.low:.3f}-{r2.high:.3f}),\n"
            f"MAE {mae.value:.1f} mm ({mae.low:.1f}-{mae.high:.1f})"
        )
        axes.scatter(
            results["true_mm"], results["predicted_mm"], s=5, alpha=0.35, color=colour, edgecolors="none"
        )
        axes.scatter([], [], color=colour, label=label)
    ends = np.concatenate([results["true_mm"] for results in world.values()])
    axes.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color="0.4", linewidth=0.8)
    axes.set(
        title="Position of a slice, read by ridge", xlabel="true mm from the middle", ylabel="predicted mm"
    )
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def _draw_bars(axes: Axes, world: Mapping[str, dict[str, Any]], measures: Mapping[str, str]) -> None:
    width = 0.8 / len(world)
    for number, (colour, (encoder, results)) in enumerate(zip(COLOURS, world.items(), strict=False)):
        means: list[Mean] = [results[key] for key in measures.values()]
        places = np.arange(len(means)) + (number - (len(world) - 1) / 2) * width
        bars = axes.bar(places, [mean.value for mean in means], width * 0.92, color=colour, label=encoder)
        axes.errorbar(places, [m.value for m in means], _arms(means), fmt="none", color="black", capsize=3)
        texts = [f"{mean.value:.2f}" for mean in means]
        axes.bar_label(bars, texts, label_type="center", color="white", fontsize=9, fontweight="bold")
    axes.set_xticks(range(len(measures)), list(measures))


def _arms(means: Sequence[Mean]) -> np.ndarray:
    """Lengths of error bars; an interval need not hold its estimate."""
    return np.array([(m.value - m.low, m.high - m.value) for m in means]).T.clip(min=0)


def _draw_band(axes: Axes, places: Sequence[float], means: Sequence[Mean], label: str, colour: str) -> None:
    axes.plot(places, [mean.value for mean in means], marker="o", markersize=4, color=colour, label=label)
    axes.fill_between(
        places, [mean.low for mean in means], [mean.high for mean in means], alpha=0.2, color=colour
    )


def _draw_spans(axes: Axes, world: Mapping[str, dict[str, Any]]) -> None:
    spans = {
        encoder: results["organ_spans"] for encoder, results in world.items() if "organ_spans" in results
    }
    axes.set_title("Organ spans read by ridge: IoU (boundary error in mm)")
    if not spans:
        _say_not_measured(axes, "dense_labels_dir")
        return
    organs = list(dict.fromkeys(organ for of_encoder in spans.values() for organ in of_encoder))
    height = 0.8 / len(spans)
    for number, (colour, (encoder, of_encoder)) in enumerate(zip(COLOURS, spans.items(), strict=False)):
        means = [of_encoder[organ]["iou"] for organ in organs]
        places = np.arange(len(organs)) + (number - (len(spans) - 1) / 2) * height
        axes.barh(places, [mean.value for mean in means], height * 0.92, color=colour, label=encoder)
        axes.errorbar(
            [m.value for m in means],
            places,
            xerr=_arms(means),
            fmt="none",
            color="black",
            capsize=1.5,
            linewidth=0.8,
        )  # fmt: skip
        for place, organ in zip(places, organs, strict=True):
            axes.text(
                0.01, place, f"{of_encoder[organ]['boundary_mm'].value:.0f} mm", va="center", fontsize=6
            )
    axes.set_yticks(range(len(organs)), organs, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)


def _draw_strides(axes: Axes, world: Mapping[str, dict[str, Any]]) -> None:
    axes.set_title("Abnormalities from every k-th slice")
    shown = {encoder: results["strides"] for encoder, results in world.items() if "strides" in results}
    if not shown:
        _say_not_measured(axes, "probe_dirs")
        return
    for colour, (encoder, strides) in zip(COLOURS, shown.items(), strict=False):
        _draw_band(axes, list(strides), [means["macro_auroc"] for means in strides.values()], encoder, colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(strides), [str(stride) for stride in strides])
    axes.set(xlabel="k", ylabel="macro AUROC")


def _say_not_measured(axes: Axes, knob: str) -> None:
    axes.text(0.5, 0.5, f"not measured: give {knob}", ha="center", va="center", color="0.5")
    axes.set_xticks([])
    axes.set_yticks([])
