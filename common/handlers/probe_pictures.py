"""Which volumes of a tested probe are worth a look, and their CTs."""

# S slices, H W pixels

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.cohort.labels_csv import volume_name
from common.cohort.predictions import Predictions
from common.ct import nifti as nifti_ct


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
        ct_dir: folder searched for ``<volume>.nii.gz`` with its sub-folders.
        volumes: volumes to read.

    Returns:
        Volume to its slices ``(S, H, W)`` in HU.

    Raises:
        FileNotFoundError: if a volume has no file.
    """
    found = {volume_name(path.name): path for path in Path(ct_dir).rglob("*.nii.gz")}
    missing = [volume for volume in volumes if volume not in found]
    if missing:
        raise FileNotFoundError(f"ct_dir must hold '{missing[0]}.nii.gz', got none in '{ct_dir}'.")
    return {volume: nifti_ct.read_ct(found[volume]).hu for volume in volumes}
