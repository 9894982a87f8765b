"""Split a cohort by patient, so that no patient has scans on both sides."""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np


def patient_of(volume: str) -> str:
    """Return the patient a volume belongs to: its name's first two fields.

    CT-RATE starts counting patients again in each of its splits, so that the number alone does not name one.
    RAD-ChestCT does not publish which volumes share a patient: each counts as a patient.

    Args:
        volume: CT-RATE's name such as ``train_1_a_1``: split, patient, scan, reconstruction; or RAD-ChestCT's
            such as ``trn00001``.

    Raises:
        ValueError: if the name has another form, such as that of a DICOM series, whose first numbers name
            an organisation.

    Example:
        >>> patient_of("train_12_a_1"), patient_of("valid_12_b_2"), patient_of("tst00012")
        ('train_12', 'valid_12', 'tst00012')
    """
    match = re.match(r"([^_]+_[^_]+)_", volume) or re.fullmatch(r"((?:trn|val|tst)[0-9]+)", volume)
    if match is None or re.fullmatch(r"[0-9]+(_[0-9]+){4,}", volume):
        raise ValueError(
            "volume must be named <split>_<patient>_<scan>_<reconstruction>, or trn, val or tst and a "
            f"number, got '{volume}'. Rename it, so that scans of one patient can be recognised."
        )
    return match[1]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Key to sort names by: runs of digits count as numbers.

    Example:
        >>> sorted(["train_10", "train_9", "train_1"], key=natural_order)
        ['train_1', 'train_9', 'train_10']
    """
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def split_by_patient(volumes: Sequence[str], num_val_patients: int, seed: int) -> dict[str, list[str]]:
    """Draw patients for validation; the others are for training.

    Source: DALE-CT IV-B, 1,000 patients. NumPy's legacy generator draws from the patients in natural order,
    so that the order of the volumes does not matter. The authors' released code draws in the order of the
    label table, which gives the same patients where the table is in natural order.

    Args:
        volumes: volumes of all patients to draw from; another set of patients is another draw.
        num_val_patients: patients to draw.
        seed: seed of the draw; the authors use 42.

    Returns:
        ``train`` and ``validation``: volumes, in the given order.

    Raises:
        ValueError: if one side would have no patient.

    Example:
        >>> split_by_patient(["train_1_a_1", "train_1_a_2", "train_2_a_1"], num_val_patients=1, seed=42)
        {'train': ['train_1_a_1', 'train_1_a_2'], 'validation': ['train_2_a_1']}
    """
    patients = sorted({patient_of(volume) for volume in volumes}, key=natural_order)
    if not 0 < num_val_patients < len(patients):
        raise ValueError(
            f"num_val_patients must be at least 1 and smaller than the number of patients, {len(patients)}, "
            f"got {num_val_patients}. Pass --num_val_patients."
        )
    drawn = np.random.RandomState(seed).choice(patients, num_val_patients, replace=False).tolist()
    return _sides(volumes, {"train": set(patients).difference(drawn), "validation": set(drawn)})


def split_three_ways(
    volumes: Sequence[str], seed: int, percent: tuple[int, int, int] = (70, 10, 20)
) -> dict[str, list[str]]:
    """Deal patients to training, validation and test.

    Source: DALE-CT IV-A, 70/10/20 of the annotated scans' patients. NumPy's legacy generator permutes the
    patients in alphabetical order, as in the authors' released code. Our choice: the numbers for training
    and validation are rounded down, and the rest is for the test.

    Args:
        volumes: in any order.
        seed: seed of the draw; the authors use 42.
        percent: percent of the patients for training, validation and test.

    Returns:
        ``train``, ``validation`` and ``test``: volumes, in the given order.

    Raises:
        ValueError: if the percentages do not add up to 100, or one side would have no patient.

    Example:
        >>> sides = split_three_ways([f"valid_{patient}_a_1" for patient in range(1, 11)], seed=42)
        >>> {side: len(volumes) for side, volumes in sides.items()}
        {'train': 7, 'validation': 1, 'test': 2}
    """
    if sum(percent) != 100 or min(percent) <= 0:
        raise ValueError(f"percent must be positive and add up to 100, got {percent}.")
    patients = sorted({patient_of(volume) for volume in volumes})
    order = np.random.RandomState(seed).permutation(patients).tolist()
    num_train, num_val = (len(order) * part // 100 for part in percent[:2])
    sides = {
        "train": set(order[:num_train]),
        "validation": set(order[num_train : num_train + num_val]),
        "test": set(order[num_train + num_val :]),
    }
    empty = [side for side, members in sides.items() if not members]
    if empty:
        raise ValueError(
            f"volumes must have enough patients for a {percent} percent split, got {len(order)}: none for "
            f"'{empty[0]}'."
        )
    return _sides(volumes, sides)


def _sides(volumes: Sequence[str], patients: Mapping[str, set[str]]) -> dict[str, list[str]]:
    return {
        side: [volume for volume in volumes if patient_of(volume) in members]
        for side, members in patients.items()
    }


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
