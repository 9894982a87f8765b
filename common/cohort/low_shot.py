"""Training sets with few labels: a share of the patients, a smaller share being part of a larger one."""

import math
from collections.abc import Sequence

import numpy as np

from common.cohort.patient_split import natural_order, patient_of, split_by_patient


def low_shot_split(
    volumes: Sequence[str], num_val_patients: int, seed: int, fraction: float
) -> dict[str, list[str]]:
    """Split a cohort as :func:`common.cohort.patient_split.split_by_patient` does, and keep few to train on.

    The seed puts the training patients in one order, and the first ceil(fraction x patients) are kept, so
    that 1 % is part of 10 %. All validation patients are kept: the curve shows what training labels are
    worth, with a choice of probe and thresholds that is equally good at every point.

    Args:
        volumes: volumes of all patients to draw from.
        num_val_patients: patients to draw for validation.
        seed: seed of the draw and of the order.
        fraction: share of the training patients, above 0 and at most 1.

    Returns:
        ``train`` and ``validation``: volumes, in the given order.

    Raises:
        ValueError: if the fraction is out of range, or as ``split_by_patient``.

    Example:
        >>> volumes = [f"train_{patient}_a_1" for patient in range(1, 11)]
        >>> [len(low_shot_split(volumes, 2, 42, fraction)["train"]) for fraction in (0.1, 0.5, 1.0)]
        [1, 4, 8]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}.")
    sides = split_by_patient(volumes, num_val_patients, seed)
    patients = sorted({patient_of(volume) for volume in sides["train"]}, key=natural_order)
    order = np.random.default_rng([seed, len(patients)]).permutation(len(patients))
    # rounded first: 0.07 of 100 patients is 7.000000000000001 of them in floating point
    kept = {patients[place] for place in order[: math.ceil(round(fraction * len(patients), 9))]}
    return sides | {"train": [volume for volume in sides["train"] if patient_of(volume) in kept]}
