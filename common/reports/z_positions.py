"""Where along the body one scan's slices lie, as read by a ridge that was fitted on another scan.

``python -m common.reports.z_positions FITTED OTHER ... --bundle bundles/dale_ct_2s --out z.png``
"""

# S slices, D embedding

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from common.metrics.linear_readout import PENALTIES, moments, read_out, ridge
from common.reports.ct_tokens import encode, open_encoder, read_images
from common.reports.latent_paths import COLOURS, principal_plane
from common.reports.options import Bundle, Out, Overrides, SizePx, Weights
from common.run.atomic_file import atomic_file
from common.run.short_errors import short_errors

FloatArray = NDArray[np.float64]

FOLDS = 5
"""Stretches of the fitted scan that are left out in turn to choose the penalty; our choice."""


class Reading(NamedTuple):
    """What a fit says of a scan.

    Args:
        predicted_mm: position of each slice in the fitted scan, ``(S,)``.
        error_mm: mean distance from the scan's own positions, moved by the best offset: scans do not begin at
            the same place of the body.
        correlation: Pearson's, of predicted and own positions.
    """

    predicted_mm: FloatArray
    error_mm: float
    correlation: float


def fit_positions(tokens: ArrayLike, z_mm: ArrayLike) -> FloatArray:
    """Fit a ridge from slice embeddings to mm; the penalty is the best on stretches left out.

    Args:
        tokens: CLS of a scan's slices.
        z_mm: their positions.

    Shape:
        ``tokens (S, D)``, ``z_mm (S,)``. Output: of :func:`common.metrics.linear_readout.ridge`.

    Raises:
        ValueError: if there are fewer slices than stretches.
    """
    features, target = np.asarray(tokens, np.float64), np.asarray(z_mm, np.float64)[:, None]
    if len(features) < FOLDS:
        raise ValueError(f"the fitted scan must have at least {FOLDS} slices, got {len(features)}.")
    errors = np.zeros(len(PENALTIES))
    for out in np.array_split(np.arange(len(features)), FOLDS):
        rest = np.setdiff1d(np.arange(len(features)), out)
        fits = ridge(moments(features[rest], target[rest]))
        errors += np.abs(read_out(fits, features[out]) - target[out]).sum((1, 2))
    fit: FloatArray = ridge(moments(features, target), [PENALTIES[int(errors.argmin())]])[0]
    return fit


def read_positions(fit: ArrayLike, tokens: ArrayLike, z_mm: ArrayLike) -> Reading:
    """Read the positions of another scan's slices.

    Args:
        fit: of :func:`fit_positions`.
        tokens: CLS of its slices.
        z_mm: their positions in their own scan.

    Shape:
        ``tokens (S, D)``, ``z_mm (S,)``.
    """
    predicted, own = read_out(fit, tokens)[:, 0], np.asarray(z_mm, np.float64)
    offset = np.median(predicted - own)
    varies = predicted.std() > 0 and own.std() > 0
    correlation = float(np.corrcoef(predicted, own)[0, 1]) if varies else float("nan")
    return Reading(predicted, float(np.abs(predicted - own - offset).mean()), correlation)


def draw_positions(
    path: str | Path,
    fitted: str,
    scans: Sequence[tuple[str, FloatArray, FloatArray, Reading]],
    title: str,
) -> None:
    """Draw for every scan its positions as read, and its path through latent space.

    Args:
        path: PNG to write.
        fitted: name of the scan that was fitted.
        scans: name, CLS tokens, positions and reading of each.
        title: of the picture.
    """
    figure = Figure(figsize=(4.2 * len(scans), 7.6), layout="constrained")
    grid = figure.subplots(2, len(scans), squeeze=False)
    for (above, below), (name, tokens, z_mm, reading) in zip(grid.T, scans, strict=True):
        height = (z_mm - z_mm[0]) / max(float(z_mm[-1] - z_mm[0]), 1e-9)
        above.scatter(z_mm, reading.predicted_mm, c=height, cmap=COLOURS, s=12)
        offset = np.median(reading.predicted_mm - z_mm)
        above.plot(z_mm, z_mm + offset, color="0.5", linewidth=0.8)
        above.set_title(
            f"{name[:34]}\nr {reading.correlation:.3f}, {reading.error_mm:.1f} mm off, up to an offset",
            fontsize=8,
        )
        above.set_xlabel("mm in this scan", fontsize=8)
        above.set_ylabel(f"mm in {fitted[:26]}, read", fontsize=8)
        places, share = principal_plane(tokens)
        below.plot(*places.T, color="0.75", linewidth=0.8, zorder=1)
        below.scatter(*places.T, c=height, cmap=COLOURS, s=12, zorder=2)
        below.set_title(f"main plane, {share:.0%} of variance", fontsize=8)
        below.set(xticks=[], yticks=[])
        below.set_aspect("equal", adjustable="datalim")
    figure.suptitle(title, fontsize=10)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120)


def main(
    fitted: Annotated[Path, typer.Argument(help="CT whose positions are learned.")],
    others: Annotated[list[Path], typer.Argument(help="CTs whose positions are read.")],
    bundle: Bundle,
    out: Out,
    weights: Weights = None,
    overrides: Overrides = None,
    size_px: SizePx = None,
) -> None:
    """Learn from one scan where a slice lies, and read it in others; draw all scans' paths.

    Example: python -m common.reports.z_positions a.nii.gz b.nii.gz --bundle bundles/dale_ct_2s --out z.png
    """
    short_errors()
    encoder = open_encoder(bundle, weights, overrides or (), size_px)
    scans = []
    for path in (fitted, *others):
        images = read_images(path, encoder.size_px)
        scans.append((images.name, encode(encoder, images.hu).cls.double().numpy(), images.z_mm))
    fit = fit_positions(*scans[0][1:])
    read = [(name, tokens, z_mm, read_positions(fit, tokens, z_mm)) for name, tokens, z_mm in scans]
    draw_positions(
        out, scans[0][0], read, f"Positions by a ridge on {scans[0][0]}, from CLS tokens of {encoder.name}"
    )
    for name, _, _, reading in read:
        typer.echo(f"{name}: r {reading.correlation:.3f}, {reading.error_mm:.1f} mm off, up to an offset")


if __name__ == "__main__":
    typer.run(main)
