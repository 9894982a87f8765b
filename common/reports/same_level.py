"""Find the level of a slice in other scans by its CLS token, without any training.

``python -m common.reports.same_level QUERY.nii.gz OTHER.nii.gz ... --bundle bundles/dale_ct_2s --out
level.png``
"""

# S slices of the query, R slices of another scan, D embedding

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from common.reports.ct_tokens import CTImages, encode, open_encoder, read_images, show_slice, slices_to_show
from common.reports.options import Bundle, Out, Overrides, SizePx, Slices, Weights
from common.run.atomic_file import atomic_file
from common.run.short_errors import short_errors

FloatArray = NDArray[np.float64]


class Match(NamedTuple):
    """What another scan has of the query's slices.

    Args:
        similarity: cosine of every pair of CLS tokens, ``(S, R)``.
        best: slice of the other scan most like each of the query's, ``(S,)``.
        of_volumes: cosine of the two scans' mean CLS tokens.
    """

    similarity: FloatArray
    best: NDArray[np.intp]
    of_volumes: float


def match_levels(query: ArrayLike, other: ArrayLike) -> Match:
    """Compare the slices of two scans, after taking away the mean of all their CLS tokens.

    What all slices share says nothing of their level, and would make every pair look alike.

    Args:
        query: CLS tokens of one scan.
        other: of another.

    Shape:
        ``(S, D)`` and ``(R, D)``.

    Raises:
        ValueError: if widths differ.

    Example:
        >>> match_levels([[5, 0], [0, 1]], [[0, 2], [4, 4], [3, 0]]).best.tolist()
        [2, 0]
    """
    one, two = np.asarray(query, np.float64), np.asarray(other, np.float64)
    if one.shape[1:] != two.shape[1:]:
        raise ValueError(f"scans must be of one encoder, got widths {one.shape[1:]} and {two.shape[1:]}.")
    mean = np.concatenate([one, two]).mean(0)
    similarity = _cosine(one - mean, two - mean)
    return Match(similarity, similarity.argmax(1), float(_cosine(one.mean(0)[None], two.mean(0)[None])[0, 0]))


def _cosine(one: FloatArray, two: FloatArray) -> FloatArray:
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True).clip(min=1e-300) for part in (one, two)]
    product: FloatArray = unit[0] @ unit[1].T
    return product


def draw_levels(
    path: str | Path,
    query: CTImages,
    slices: Sequence[int],
    others: Sequence[tuple[CTImages, Match]],
    title: str,
) -> None:
    """Draw slices of the query and below each its match in every other scan, with the matrix of similarities.

    Args:
        path: PNG to write.
        query: the scan asked for.
        slices: of the query.
        others: scans with their matches, the most alike first.
        title: of the picture.
    """
    rows, columns = 1 + len(others), len(slices) + 1
    figure = Figure(figsize=(2.3 * columns + 0.6, 2.55 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    grid[0, -1].axis("off")
    for column, place in enumerate(slices):
        show_slice(grid[0, column], query.hu[place], f"query: slice {place}, {query.z_mm[place]:.0f} mm")
        for row, (images, match) in enumerate(others, 1):
            found = int(match.best[place])
            label = f"slice {found}, {images.z_mm[found]:.0f} mm, cos {match.similarity[place, found]:.2f}"
            show_slice(grid[row, column], images.hu[found], label)
    grid[0, 0].set_ylabel(query.name[:26], fontsize=8)
    for row, (images, match) in enumerate(others, 1):
        grid[row, 0].set_ylabel(f"{images.name[:26]}\nvolumes: cos {match.of_volumes:.3f}", fontsize=8)
        axes = grid[row, -1]
        extent = (float(images.z_mm[0]), float(images.z_mm[-1]), float(query.z_mm[0]), float(query.z_mm[-1]))
        axes.imshow(match.similarity, origin="lower", aspect="auto", extent=extent, cmap="viridis")
        axes.plot(images.z_mm[match.best], query.z_mm, ".", color="white", markersize=2)
        axes.set_xlabel("mm in this scan", fontsize=7)
        axes.set_ylabel("mm in the query", fontsize=7)
        axes.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=9)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def main(
    query: Annotated[Path, typer.Argument(help="CT whose levels are looked for.")],
    others: Annotated[list[Path], typer.Argument(help="CTs to find them in.")],
    bundle: Bundle,
    out: Out,
    slices: Slices = None,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Find the levels of a scan's slices in other scans, which are listed the most alike first.

    Example: python -m common.reports.same_level a.nii.gz b.nii.gz --bundle bundles/dale_ct_2s
    --out level.png
    """
    short_errors()
    encoder = open_encoder(bundle, weights, overrides or (), size_px)
    asked = read_images(query, encoder.size_px)
    of_query = encode(encoder, asked.hu).cls
    found = []
    for path in others:
        images = read_images(path, encoder.size_px)
        found.append((images, match_levels(of_query, encode(encoder, images.hu).cls)))
    found.sort(key=lambda item: -item[1].of_volumes)
    chosen = slices_to_show(slices, len(asked.hu), 5)
    draw_levels(out, asked, chosen, found, f"Same level by CLS token of {encoder.name}, nothing trained")


if __name__ == "__main__":
    typer.run(main)
