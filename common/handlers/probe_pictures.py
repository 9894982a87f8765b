"""Which volumes of a tested probe are worth a look, and their CTs."""

# S slices, H W pixels

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.cohort.predictions import Predictions
from common.embeddings.sources import ct_sources


def volumes_to_show(predictions: Predictions, most: int = 8) -> dict[str, str]:
    """Choose volumes to look at: of each class the true positive that the probe is surest of.

    Classes that it never finds are passed over, and a volume is chosen once, for its first class.

    Args:
        predictions: of the test set.
        most: volumes to choose at most.

    Returns:
        Volume to the class it was chosen for.
    """
    chosen: dict[str, str] = {}
    for index, name in enumerate(predictions.class_names):
        scores, targets = predictions.probabilities[:, index], predictions.labels[:, index]
        found = np.flatnonzero((targets == 1) & (scores >= predictions.thresholds[index]))
        if len(found) and len(chosen) < most:
            chosen.setdefault(predictions.volumes[found[scores[found].argmax()]], name)
    return chosen


def read_slices(ct_dir: str | Path, volumes: Sequence[str]) -> dict[str, np.ndarray]:
    """Read CT volumes as axial slices, feet to head, shown the radiological way.

    Args:
        ct_dir: what embeddings were made of: whatever ``ct_sources`` reads.
        volumes: volumes to read.

    Returns:
        Volume to its slices ``(S, H, H)`` in HU.

    Raises:
        FileNotFoundError: if a volume is not there.
        RejectedError: if one cannot be read.
    """
    found = {source.volume: source for source in ct_sources(ct_dir)[0]}
    missing = [volume for volume in volumes if volume not in found]
    if missing:
        raise FileNotFoundError(f"No CT of '{missing[0]}' in '{ct_dir}'.")
    return {volume: found[volume].read().hu for volume in volumes}
