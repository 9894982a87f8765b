"""Split a cohort by patient, so that no patient's scans stand on both sides."""

import re
from collections.abc import Sequence

import numpy as np


def patient_of(volume: str) -> str:
    """Return the patient a volume belongs to: its name's first two fields.

    CT-RATE counts patients anew in each of its splits, so that the number alone does not name one.

    Args:
        volume: name such as ``train_1_a_1``: split, patient, scan, reconstruction.

    Raises:
        ValueError: if the name has another form.

    Example:
        >>> patient_of("train_12_a_1"), patient_of("valid_12_b_2")
        ('train_12', 'valid_12')
    """
    match = re.match(r"([^_]+_[^_]+)_", volume)
    if match is None:
        raise ValueError(f"volume must be named <split>_<patient>_<scan>_<reconstruction>, got '{volume}'.")
    return match[1]


def split_by_patient(volumes: Sequence[str], num_val_patients: int, seed: int) -> dict[str, list[str]]:
    """Draw the patients of the validation set; the others are for training.

    Source: DALE-CT IV-B, 1,000 patients. The draw is NumPy's legacy one over patients in the order in which
    they first appear, so that the same list of volumes gives the split of the authors' released code.

    Args:
        volumes: volumes in the order of their label table.
        num_val_patients: patients to draw.
        seed: seed of the draw; the authors use 42.

    Returns:
        ``train`` and ``validation``: volumes, in the given order.

    Raises:
        ValueError: if the draw would leave no patient on one side.

    Example:
        >>> split_by_patient(["train_1_a_1", "train_1_a_2", "train_2_a_1"], num_val_patients=1, seed=42)
        {'train': ['train_1_a_1', 'train_1_a_2'], 'validation': ['train_2_a_1']}
    """
    patients = list(dict.fromkeys(patient_of(volume) for volume in volumes))
    if not 0 < num_val_patients < len(patients):
        raise ValueError(
            f"num_val_patients must be at least 1 and smaller than the number of patients, {len(patients)}, "
            f"got {num_val_patients}. Pass --num_val_patients."
        )
    drawn = set(np.random.RandomState(seed).choice(patients, num_val_patients, replace=False).tolist())
    return {
        "train": [volume for volume in volumes if patient_of(volume) not in drawn],
        "validation": [volume for volume in volumes if patient_of(volume) in drawn],
    }
