"""How the distance between embeddings grows with the distance between their slices."""

# S slices, K gaps, D embedding

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.metrics.latent_continuity import DISTANCES

FloatArray = NDArray[np.float64]


def matched_slices(z_mm: ArrayLike, step_mm: float) -> NDArray[np.intp]:
    """Choose slices about ``step_mm`` apart, each at most once, so that volumes of any spacing compare.

    They are the nearest to positions counted from the first slice. A coarser volume keeps all its slices.

    Args:
        z_mm: position of each slice, ascending.
        step_mm: distance between the positions.

    Shape:
        ``(S,)``. Output: indices, ascending.

    Raises:
        ValueError: if the step is not positive.

    Example:
        >>> matched_slices([0, 1, 2, 3, 4, 5, 6], 2.5).tolist()
        [0, 2, 5]
    """
    if not step_mm > 0:
        raise ValueError(f"step_mm must be positive, got {step_mm}.")
    place = np.asarray(z_mm, np.float64)
    wanted = np.arange(place[0], place[-1] + 1e-6, step_mm)
    after = np.searchsorted(place, wanted).clip(1, max(len(place) - 1, 1))
    nearest = np.where(
        wanted - place[after - 1] <= place[after.clip(max=len(place) - 1)] - wanted, after - 1, after
    )
    return np.unique(nearest.clip(max=len(place) - 1))


def gap_curve(
    embeddings: ArrayLike, z_mm: ArrayLike, gaps_mm: Sequence[float], distance: str = "cosine"
) -> FloatArray:
    """Return the mean distance between slices of a volume that lie each gap apart.

    Each slice is paired with the one nearest to the gap above it, if that is off by less than half the
    smallest step between gaps (0 included), so that spacings need not divide the gaps.

    Source: DALE-CT's released world-model probes, there by number of slices.

    Args:
        embeddings: embeddings of the slices.
        z_mm: position of each slice, ascending.
        gaps_mm: gaps, ascending.
        distance: one of ``common.metrics.latent_continuity.DISTANCES``.

    Shape:
        ``embeddings (S, D)``, ``z_mm (S,)``. Output: ``(K,)``, nan where no pair lies that far apart.

    Raises:
        ValueError: if the gaps do not ascend from above 0.

    Example:
        >>> gap_curve([[1, 0], [0, 1], [-1, 0]], [0, 2, 4], gaps_mm=[2, 4, 9])
        array([ 1.,  2., nan])
    """
    gaps = np.asarray(gaps_mm, np.float64)
    if gaps.ndim != 1 or len(gaps) == 0 or gaps[0] <= 0 or (np.diff(gaps) <= 0).any():
        raise ValueError(f"gaps_mm must ascend from above 0, got {list(gaps_mm)}.")
    tokens, place = np.asarray(embeddings, np.float64), np.asarray(z_mm, np.float64)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True).clip(min=1e-300)
    tolerance = np.diff(gaps, prepend=0).min() / 2
    curve = np.full(len(gaps), np.nan)
    for index, gap in enumerate(gaps):
        partner = np.abs(place[None] - place[:, None] - gap)
        nearest = partner.argmin(1)
        close = partner.min(1) < tolerance
        if close.any():
            curve[index] = DISTANCES[distance](unit[close], unit[nearest[close]]).mean()
    return curve
