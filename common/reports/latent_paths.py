"""Figure 2: the slices of a volume as a path through the two main directions of their embeddings."""

# S slices, D embedding

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from common.embeddings.store import EmbeddingStore
from common.metrics.slice_paths import latent_continuity
from common.run.process import write_figure

FloatArray = NDArray[np.float64]
COLOURS = "viridis"


def principal_plane(embeddings: ArrayLike) -> tuple[FloatArray, float]:
    """Project the slices of a volume ``(S, D)``, two or more, on the plane in which they vary most.

    Signs are free in a PCA: the first slice lies to the left, and below where it can.

    Source: DALE-CT Figure 2.

    Returns:
        Places ``(S, 2)``, and the share of the variance in the plane.
    """
    tokens = np.asarray(embeddings, np.float64)
    left, values, _ = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    places = left[:, :2] * values[:2]
    places = places * np.where(places[0] > 0, -1, 1)
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 1)))
    total = (values**2).sum()
    return places, float((values[:2] ** 2).sum() / total) if total > 0 else float("nan")


def draw_paths(
    path: str | Path, paths: Mapping[str, Mapping[str, tuple[FloatArray, FloatArray]]], title: str = ""
) -> None:
    """Draw volumes as rows and encoders as columns, each slice a point coloured by its height in the body.

    Args:
        path: PNG to write.
        paths: encoder to volume to embeddings ``(S, D)`` and positions in mm ``(S,)``; the same volumes for
            all encoders.
        title: text above the picture.
    """
    encoders = list(paths)
    volumes = list(paths[encoders[0]])
    figure = Figure(figsize=(4.3 * len(encoders) + 0.9, 3.7 * len(volumes) + 0.6), layout="constrained")
    grid = figure.subplots(len(volumes), len(encoders), squeeze=False)
    for row, volume in zip(grid, volumes, strict=True):
        for axes, encoder in zip(row, encoders, strict=True):
            tokens, z_mm = paths[encoder][volume]
            share = draw_path(axes, tokens, z_mm)
            scores = " / ".join(f"{latent_continuity(tokens, name):.3f}" for name in ("cosine", "geodesic"))
            about = f"{share:.0%} of variance; continuity {scores} (cosine / geodesic)"
            axes.set_title(f"{encoder}\n{volume}\n{about}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=grid, shrink=0.6, aspect=30)
    bar.set_label("height in the scan, feet (0) to head (1)")
    figure.suptitle(title, fontsize=10)
    write_figure(path, figure)


def draw_path(axes: Axes, tokens: FloatArray, z_mm: FloatArray) -> float:
    """Draw slices ``(S, D)`` as a path through their main plane, and return its share of the variance."""
    places, share = principal_plane(tokens)
    axes.plot(*places.T, color="0.75", linewidth=0.8, zorder=1)
    axes.scatter(places[:, 0], places[:, 1], c=heights(z_mm), cmap=COLOURS, vmin=0, vmax=1, s=14, zorder=2)
    for place, name in ((places[0], "feet"), (places[-1], "head")):
        axes.annotate(name, place, xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    return share


def heights(z_mm: FloatArray) -> FloatArray:
    """Return positions from the feet to the head ``(S,)`` as shares of the scan's length, from 0 to 1."""
    return (z_mm - z_mm[0]) / max(float(z_mm[-1] - z_mm[0]), 1e-9)


def chosen_paths(
    stores: Sequence[EmbeddingStore], volumes: Sequence[str]
) -> dict[str, dict[str, tuple[FloatArray, FloatArray]]]:
    """Read what :func:`draw_paths` draws from stores, one per encoder.

    Stores that share an encoder's name, as of two trainings, are named by their folders.

    Raises:
        KeyError: if a store has no such volume.
        ValueError: if a store holds tokens of another kind than slices.
    """
    paths: dict[str, dict[str, tuple[FloatArray, FloatArray]]] = {}
    encoders = [store.identity["encoder"] for store in stores]
    for store, encoder in zip(stores, encoders, strict=True):
        name = encoder if encoders.count(encoder) == 1 else str(store.folder)
        paths[name] = {}
        for volume in volumes:
            embedding = store.read(volume)
            if embedding.z_mm is None:
                raise ValueError(f"The embedding of '{volume}' in '{store.folder}' is not one of slices.")
            paths[name][volume] = (embedding.tokens.double().numpy(), embedding.z_mm.double().numpy())
    return paths
