"""Figure 2: the slices of a volume as a path through the two main directions of their embeddings.

``python -m common.reports.latent_paths EMBEDDINGS ... --out figure_2.png`` draws a column an encoder.
"""

# S slices, D embedding

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from common.embeddings.store import EmbeddingStore
from common.metrics.latent_continuity import latent_continuity
from common.run.atomic_file import atomic_file
from common.run.short_errors import short_errors

FloatArray = NDArray[np.float64]
COLOURS = "viridis"


def principal_plane(embeddings: ArrayLike) -> tuple[FloatArray, float]:
    """Project a volume's slices on the plane in which they vary most.

    Signs are free in a PCA: the first slice lies to the left, and below where it can.

    Source: DALE-CT Figure 2.

    Args:
        embeddings: of the slices in order.

    Shape:
        ``(S, D)``, two slices or more. Output: ``(S, 2)``, and the share of the variance in the plane.

    Example:
        >>> places, share = principal_plane([[0, 0, 0], [1, 0, 0], [2, 0, 0]])
        >>> places.round(6)[:, 0].tolist(), round(share, 6)
        ([-1.0, 0.0, 1.0], 1.0)
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
    path: str | Path, paths: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], title: str = ""
) -> None:
    """Draw volumes as rows and encoders as columns, each slice a point coloured by its height in the body.

    Args:
        path: PNG to write.
        paths: encoder to volume to embeddings ``(S, D)`` and positions ``z_mm (S,)``; of the same volumes.
        title: above the picture.
    """
    encoders = list(paths)
    volumes = list(paths[encoders[0]])
    figure = Figure(figsize=(4.3 * len(encoders) + 0.9, 3.7 * len(volumes) + 0.6), layout="constrained")
    grid = figure.subplots(len(volumes), len(encoders), squeeze=False)
    for row, volume in zip(grid, volumes, strict=True):
        for axes, encoder in zip(row, encoders, strict=True):
            embeddings, z_mm = paths[encoder][volume]
            _draw_path(axes, np.asarray(embeddings, np.float64), np.asarray(z_mm, np.float64))
            axes.set_title(f"{encoder}\n{volume}{axes.get_title()}", fontsize=8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOURS), ax=grid, shrink=0.6, aspect=30)
    bar.set_label("height in the scan, feet (0) to head (1)")
    if title:
        figure.suptitle(title, fontsize=10)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=130)


def _draw_path(axes: Axes, tokens: FloatArray, z_mm: FloatArray) -> None:
    places, share = principal_plane(tokens)
    height = (z_mm - z_mm[0]) / max(z_mm[-1] - z_mm[0], 1e-9)
    axes.plot(*places.T, color="0.75", linewidth=0.8, zorder=1)
    axes.scatter(places[:, 0], places[:, 1], c=height, cmap=COLOURS, vmin=0, vmax=1, s=14, zorder=2)
    for place, name in ((places[0], "feet"), (places[-1], "head")):
        axes.annotate(name, place, xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    scores = " / ".join(f"{latent_continuity(tokens, name):.3f}" for name in ("cosine", "geodesic"))
    axes.set_title(f"\n{share:.0%} of variance; continuity {scores} (cosine / geodesic)")


def chosen_paths(
    stores: Sequence[EmbeddingStore], volumes: Sequence[str]
) -> dict[str, dict[str, tuple[FloatArray, FloatArray]]]:
    """Read what :func:`draw_paths` draws.

    Args:
        stores: one an encoder; those that share a name, as of two trainings, go by their folders.
        volumes: names.
    """
    paths: dict[str, dict[str, tuple[FloatArray, FloatArray]]] = {}
    encoders = [store.identity["encoder"] for store in stores]
    for store, encoder in zip(stores, encoders, strict=True):
        name = encoder if encoders.count(encoder) == 1 else str(store.folder)
        paths[name] = {}
        for volume in volumes:
            embedding = store.read(volume)
            assert embedding.z_mm is not None
            paths[name][volume] = (embedding.tokens.double().numpy(), embedding.z_mm.double().numpy())
    return paths


def main(
    embeddings: Annotated[list[Path], typer.Argument(help="Folders of slice embeddings, one an encoder.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    volume: Annotated[
        list[str] | None, typer.Option(help="Volume to draw, several times; by default the first three.")
    ] = None,
) -> None:
    """Draw the slices of volumes as paths through latent space, encoders side by side.

    Example: python -m common.reports.latent_paths embeddings/slab embeddings/flat --out figure_2.png
    """
    short_errors()
    stores = [EmbeddingStore(folder) for folder in embeddings]
    shared = sorted(set(stores[0].volumes).intersection(*(store.volumes for store in stores[1:])))
    if not shared:
        raise ValueError("embeddings must be of the same volumes, got none that all folders have.")
    draw_paths(out, chosen_paths(stores, volume or shared[:3]))


if __name__ == "__main__":
    typer.run(main)
