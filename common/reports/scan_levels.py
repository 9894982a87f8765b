"""Which level of the body a slice shows, read from CLS tokens of another scan: by likeness, or by a ridge."""

# S slices of the query, R slices of another scan, D embedding

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from common.metrics.linear_readout import PENALTIES, moments, read_out, ridge
from common.metrics.slice_paths import unit_vectors
from common.reports.ct_tokens import CTImages
from common.reports.latent_paths import COLOURS, draw_path, heights
from common.reports.slice_grid import Row, slice_grid

FloatArray = NDArray[np.float64]

FOLDS = 5
"""Stretches of the fitted scan that are left out in turn to choose the penalty; our choice."""


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
    """Compare the slices of two scans by their CLS tokens, ``(S, D)`` and ``(R, D)``, less their mean.

    What all slices share says nothing about their level, and would make every pair look alike.

    Raises:
        ValueError: if widths differ.
    """
    one, two = np.asarray(query, np.float64), np.asarray(other, np.float64)
    if one.shape[1:] != two.shape[1:]:
        raise ValueError(f"scans must be of one encoder, got widths {one.shape[1:]} and {two.shape[1:]}.")
    mean = np.concatenate([one, two]).mean(0)
    similarity = unit_vectors(one - mean) @ unit_vectors(two - mean).T
    of_volumes = unit_vectors(one.mean(0)) @ unit_vectors(two.mean(0))
    return Match(similarity, similarity.argmax(1), float(of_volumes))


class Reading(NamedTuple):
    """What a fit says about a scan.

    Args:
        predicted_mm: position of each slice in the fitted scan, ``(R,)``.
        offset_mm: median distance from the true positions: scans do not begin at the same place of the body.
        error_mm: mean absolute distance from the true positions, moved by the offset.
        correlation: Pearson's, of predicted and true positions.
    """

    predicted_mm: FloatArray
    offset_mm: float
    error_mm: float
    correlation: float


def fit_positions(tokens: ArrayLike, z_mm: ArrayLike) -> FloatArray:
    """Fit a ridge from the CLS tokens of a scan ``(S, D)`` to its positions in mm ``(S,)``.

    The penalty is the best on stretches left out.

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
    """Read the positions of a scan's slices by a fit of :func:`fit_positions` to another scan."""
    predicted, true = read_out(fit, tokens)[:, 0], np.asarray(z_mm, np.float64)
    offset = float(np.median(predicted - true))
    varies = predicted.std() > 0 and true.std() > 0
    correlation = float(np.corrcoef(predicted, true)[0, 1]) if varies else float("nan")
    return Reading(predicted, offset, float(np.abs(predicted - true - offset).mean()), correlation)


class Scan(NamedTuple):
    """A scan in the picture: its slices, their CLS tokens ``(R, D)``, and what the query says about them."""

    images: CTImages
    cls: FloatArray
    match: Match
    reading: Reading


def compare_scans(images: Sequence[CTImages], cls: Sequence[FloatArray]) -> list[Scan]:
    """Compare scans with the first one, which stays first; the others are sorted, the most alike first."""
    fit = fit_positions(cls[0], images[0].z_mm)
    query, *others = (
        Scan(scan, tokens, match_levels(cls[0], tokens), read_positions(fit, tokens, scan.z_mm))
        for scan, tokens in zip(images, cls, strict=True)
    )
    return [query, *sorted(others, key=lambda scan: -scan.match.of_volumes)]


def draw_levels(scans: Sequence[Scan], slices: Sequence[int], title: str) -> Figure:
    """Draw a row per scan: slices matched to the query's, cosines of all pairs, positions read, latent path.

    Args:
        scans: scans of :func:`compare_scans`, the query first.
        slices: slices of the query to show.
        title: text above the picture.
    """
    query, rows = scans[0].images, []
    for scan in scans:
        found = list(slices) if scan is scans[0] else scan.match.best[slices].tolist()
        cosines = scan.match.similarity[slices, found]
        shown = scan.images.some(found)
        titles = [f"{text}, cos {cosine:.2f}" for text, cosine in zip(shown.titles, cosines, strict=True)]
        rows.append(Row(shown.hu, titles, f"{shown.name[:26]}\nvolumes: cos {scan.match.of_volumes:.3f}"))
    figure, grid = slice_grid(rows, title, more_columns=3)
    for (pairs, read, path), (images, cls, match, reading) in zip(grid[:, -3:], scans, strict=True):
        z_mm = images.z_mm
        extent = (*z_mm[[0, -1]].tolist(), *query.z_mm[[0, -1]].tolist())
        pairs.imshow(match.similarity, origin="lower", aspect="auto", extent=extent, cmap=COLOURS)
        pairs.plot(z_mm[match.best], query.z_mm, ".", color="white", markersize=2)
        read.scatter(z_mm, reading.predicted_mm, c=heights(z_mm), cmap=COLOURS, s=8)
        read.plot(z_mm, z_mm + reading.offset_mm, color="0.5", linewidth=0.8)
        share = draw_path(path, cls, z_mm)
        for axes, text in (
            (pairs, "cosine of each pair; dots: best"),
            (read, f"ridge: r {reading.correlation:.3f}, {reading.error_mm:.1f} mm off"),
            (path, f"main plane, {share:.0%} of variance"),
        ):
            axes.set_title(text, fontsize=8)
            axes.tick_params(labelsize=6)
        for axes in (pairs, read):
            axes.set_xlabel("mm in this scan", fontsize=7)
            axes.set_ylabel("mm in the query", fontsize=7)
    return figure
