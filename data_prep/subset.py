"""A smaller cohort with the label prevalence of the whole: Table VI's subset.

Shapes: P patients, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cohort.cohort import natural_order, patient_of
from common.run.process import atomic_file
from data_prep.tables import write_table

TRIES = 2000
"""Exchanges that are tried; for 5,000 of 20,000 synthetic patients, more changed nothing."""


class Subset(NamedTuple):
    """Chosen volumes, and how well they represent all.

    Args:
        volumes: all volumes of the chosen patients, in natural order.
        num_patients: number of chosen patients.
        prevalence: ``(C,)`` share of positive volumes in the subset.
        prevalence_of_random: ``(C,)`` in as many patients drawn at random, where the search started.
        prevalence_of_all: ``(C,)`` in the whole cohort.
    """

    volumes: list[str]
    num_patients: int
    prevalence: np.ndarray
    prevalence_of_random: np.ndarray
    prevalence_of_all: np.ndarray


def choose_subset(labels: Mapping[str, np.ndarray], num_patients: int, seed: int) -> Subset:
    """Choose patients so that the prevalence of every label, over volumes, is that of the whole cohort.

    Starting from a random draw, patients are exchanged for others with as many volumes, each time for the one
    that brings the class that is then furthest off nearest to the cohort's prevalence; exchanges that do not
    help are not made. So the subset is never further off than the random draw, and has as many volumes. All
    arithmetic is in whole numbers: the same table gives the same subset on any machine, whatever its order.

    Source: DALE-CT V-E, "label-balanced subset of 5,000 patients from the CT-RATE training split"; the
    authors' released code aims at the prevalence of the whole set, and so do we. It takes one scan per
    patient; we keep all volumes of a patient, as the other tables do. The patients whom ``split_by_patient``
    draws for validation are not left out: the paper speaks of the whole training split, and the probe draws
    its own validation patients among the 5,000.

    Args:
        labels: volume to its labels, ``(C,)`` of 0 and 1.
        num_patients: number to choose.
        seed: seed of the random draw and of the order of exchanges.

    Raises:
        ValueError: if ``num_patients`` is not positive, or there are not more patients than that.
    """
    names = sorted({patient_of(volume) for volume in labels}, key=natural_order)
    if not 0 < num_patients < len(names):
        raise ValueError(
            f"num_patients must be at least 1 and smaller than the number of patients, {len(names)}, "
            f"got {num_patients}."
        )
    place_of = {name: place for place, name in enumerate(names)}
    rows = np.array([place_of[patient_of(volume)] for volume in labels])
    values = np.array(list(labels.values())).astype(np.int64)
    num_volumes = np.bincount(rows, minlength=len(names))
    positives = np.zeros((len(names), values.shape[1]), np.int64)
    np.add.at(positives, rows, values)

    drawn, chosen = _matched(positives, num_volumes, num_patients, seed)
    kept = {names[place] for place in chosen}
    return Subset(
        volumes=sorted((volume for volume in labels if patient_of(volume) in kept), key=natural_order),
        num_patients=len(kept),
        prevalence=positives[chosen].sum(0) / num_volumes[chosen].sum(),
        prevalence_of_random=positives[drawn].sum(0) / num_volumes[drawn].sum(),
        prevalence_of_all=positives.sum(0) / num_volumes.sum(),
    )


def _matched(
    positives: np.ndarray, num_volumes: np.ndarray, num_patients: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose patients by positives ``(P, C)`` and volumes ``(P,)``; return the random draw and the choice."""
    # Positives of a patient beyond what the cohort's prevalence predicts, times the cohort's volumes: summed
    # over the chosen patients, the prevalence's error times the volumes of both.
    excess = positives * num_volumes.sum() - positives.sum(0) * num_volumes[:, None]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(num_volumes))
    chosen, others = order[:num_patients].copy(), order[num_patients:].copy()
    total = excess[chosen].sum(0)
    for place in rng.integers(num_patients, size=TRIES):
        leaving = chosen[place]
        alike = np.flatnonzero(num_volumes[others] == num_volumes[leaving])
        if len(alike) == 0:
            continue
        totals = total - excess[leaving] + excess[others[alike]]
        off = np.abs(totals).max(1)
        best = off.argmin()
        if off[best] < np.abs(total).max():
            total = totals[best]
            chosen[place], others[alike[best]] = others[alike[best]], leaving
    return order[:num_patients], chosen


def write_subset(
    path: Path, subset: Subset, labels: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> None:
    """Write the subset as a label table that can replace the whole one."""
    rows = ([volume, *labels[volume].astype(int)] for volume in subset.volumes)
    write_table(path, ["VolumeName", *class_names], rows)


def write_skip_list(path: Path, subset: Subset, labels: Mapping[str, np.ndarray]) -> None:
    """Write the volumes outside the subset, one per line, for an encoder bundle's ``skip_list``."""
    skipped = sorted(labels.keys() - set(subset.volumes), key=natural_order)
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.writelines(f"{volume}\n" for volume in skipped)
