"""From the classes that a probe was trained on to those of another data set: CT-RATE's 18 to RAD's 16."""

# N volumes, C classes of the probe, K classes of the other data set

from collections.abc import Mapping, Sequence

import numpy as np

MERGED: Mapping[str, tuple[str, ...]] = {
    "Calcification": ("Arterial wall calcification", "Coronary artery wall calcification"),
}
"""Classes that are several of CT-RATE's in one. Source: DALE-CT's released evaluation of RAD-ChestCT."""


def class_map(source: Sequence[str], target: Sequence[str]) -> list[list[int]]:
    """Find the classes of a probe that make up each class of another data set.

    A class is the one of the same name, or the several that ``MERGED`` names. Classes of the probe that the
    other data set lacks ("Mosaic attenuation pattern" in RAD-ChestCT) are dropped.

    Args:
        source: classes of the probe, C names.
        target: classes of the other data set, K names.

    Returns:
        K lists of places in ``source``.

    Raises:
        ValueError: if a class of the other data set has none in the probe.

    Example:
        >>> class_map(["Emphysema", *MERGED["Calcification"]], ["Calcification", "Emphysema"])
        [[1, 2], [0]]
    """
    places = {name: place for place, name in enumerate(source)}
    rows = []
    for name in target:
        parts = (name,) if name in places else MERGED.get(name, (name,))
        missing = [part for part in parts if part not in places]
        if missing:
            raise ValueError(
                f"probe must know the class '{missing[0]}', got {list(source)} for '{name}'. "
                "Take a probe of eval_ct_rate."
            )
        rows.append([places[part] for part in parts])
    return rows


def map_classes(
    scores: np.ndarray, thresholds: np.ndarray, source: Sequence[str], target: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Turn the scores of a probe into scores and decisions on the classes of another data set.

    The score of a merged class is the largest of its parts'; it is called positive if any of its parts
    reaches that part's own threshold.

    Args:
        scores: probabilities of the probe.
        thresholds: of the probe's classes, from its own validation set.
        source: classes of the probe.
        target: classes of the other data set.

    Shape:
        ``scores (N, C)``, ``thresholds (C,)``. Output: scores ``(N, K)`` and bool decisions ``(N, K)``.

    Raises:
        ValueError: as :func:`class_map`, and if a shape does not fit the classes.

    Example:
        >>> parts = list(MERGED["Calcification"])
        >>> both = np.array([[0.2, 0.6]]), np.array([0.1, 0.9])
        >>> score, positive = map_classes(*both, parts, ["Calcification"])
        >>> float(score[0, 0]), bool(positive[0, 0])
        (0.6, True)
    """
    if scores.shape[1:] != (len(source),) or thresholds.shape != (len(source),):
        raise ValueError(
            f"scores and thresholds must have {len(source)} classes, got shapes {scores.shape} and "
            f"{thresholds.shape}."
        )
    rows = class_map(source, target)
    decisions = scores >= thresholds
    return (
        np.stack([scores[:, places].max(1) for places in rows], axis=1),
        np.stack([decisions[:, places].any(1) for places in rows], axis=1),
    )
