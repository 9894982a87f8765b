"""From the classes that a probe was trained on to those of another data set: CT-RATE's 18 to RAD's 16."""

# N volumes, C classes of the probe, K classes of the other data set

from collections.abc import Mapping, Sequence

import numpy as np

MERGED: Mapping[str, tuple[str, ...]] = {
    "Calcification": ("Arterial wall calcification", "Coronary artery wall calcification"),
}
"""Classes that merge several of CT-RATE's. Source: DALE-CT's released evaluation of RAD-ChestCT."""


def class_map(source: Sequence[str], target: Sequence[str]) -> list[list[int]]:
    """Find the classes of a probe that make up each class of another data set, as places in ``source``.

    A class is the one of the same name, or the several that ``MERGED`` names. Classes of the probe that the
    other data set lacks ("Mosaic attenuation pattern" in RAD-ChestCT) are dropped.

    Raises:
        ValueError: if the probe lacks a class of the other data set.

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
                f"The probe does not know '{missing[0]}', which '{name}' needs, among its classes "
                f"{list(source)}. Take a probe of eval_ct_rate."
            )
        rows.append([places[part] for part in parts])
    return rows


def map_classes(
    scores: np.ndarray, thresholds: np.ndarray, source: Sequence[str], target: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Map a probe's scores ``(N, C)`` and thresholds ``(C,)`` to scores and decisions ``(N, K)`` on others.

    The score of a merged class is the largest of its parts'; it is called positive if any of its parts
    reaches that part's threshold.

    Raises:
        ValueError: as :func:`class_map`, and if a shape does not fit the classes.
    """
    if scores.shape[1:] != (len(source),) or thresholds.shape != (len(source),):
        raise ValueError(
            f"scores and thresholds must have {len(source)} classes, got shapes {scores.shape} and "
            f"{thresholds.shape}."
        )
    rows, decisions = class_map(source, target), scores >= thresholds
    return (
        np.stack([scores[:, places].max(1) for places in rows], axis=1),
        np.stack([decisions[:, places].any(1) for places in rows], axis=1),
    )
