"""Who is in a cohort: its classes, its label tables and lists of volumes, and its splits by patient."""

# C classes

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from common.ct.files import unique_names, volume_name
from common.run.process import atomic_file

LABEL_LISTS = Path(__file__).parents[1] / "labels"

HEADINGS = set(
    "volumename volume volumes volumeid name names filename file files path id image imageid scan scanid "
    "seriesinstanceuid seriesuid noteaccdeid volumeaccdeid".split()
)
"""What the column of names may be called, in lower case, without blanks and ``_``."""


class Label(NamedTuple):
    """One class of a label list.

    Args:
        index: place in the list, from 0.
        name: the data set's name of the class.
        code: the data set's short code, empty where it has none.
        pos_weight: weight of a positive in binary cross entropy.
        frequency: share of the class in all voxels; NaN where it is unknown.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody looks for here
    name: str
    code: str
    pos_weight: float
    frequency: float


def load_labels(name: str) -> list[Label]:
    """Read a label list: ``common/labels/<name>.csv``, or the path of another that ends in ``.csv``.

    ``ct_rate`` (18), ``rad_chestct`` (16): classes of the probes in the data set's order, unweighted.
    ``rexgroundingct`` (14): finding categories ``1a`` to ``2h``; weight 800 each, as DALE-CT's authors train.
    ``totalsegmentator`` (118): background and the 117 classes of TotalSegmentator 2's task ``total``, names
    from its class map; weights as DALE-CT's authors train: 1 for background and anatomy outside the chest,
    elsewhere one over the share of the class in all voxels, at most 1000. They did not publish the shares:
    ``frequency`` is one over the weight (an upper bound where that is 1000, a guess for findings), what is
    left for the background, and empty for other classes of weight 1. ``data_prep pos-weights`` measures both.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if there is no such list.
    """
    path = Path(name) if name.endswith(".csv") else LABEL_LISTS / f"{name}.csv"
    known = sorted(file.stem for file in LABEL_LISTS.glob("*.csv"))
    if path.parent == LABEL_LISTS and name not in known:
        raise ValueError(f"name must be one of {known} or the path of a CSV file, got '{name}'.")
    rows = table_rows(path, name, ("index", "name", "code", "pos_weight"))
    return [
        Label(
            *(int(row["index"]), row["name"], row["code"]),
            *(float(row["pos_weight"]), float(row.get("frequency") or "nan")),
        )
        for row in rows
    ]


def pos_weights(name: str) -> list[float]:
    """Return the positive weights of a label list, in its order, for a bundle's config."""
    return [label.pos_weight for label in load_labels(name)]


UNKNOWN_PREVALENCE = 0.01
"""Stands in where the prevalence is not known. Source: where focal loss starts, arXiv:1708.02002, 4.1."""

LEAST_PREVALENCE = 1e-5  # a class that was never seen may still occur


def prior_logits(prevalence: ArrayLike, pos_weight: ArrayLike) -> np.ndarray:
    """Return the constant logits with the least binary cross-entropy: log(w p / (1 - p)).

    With a weight ``w`` on the positive part and mean target ``p`` the best constant probability is
    ``w p / (w p + 1 - p)``. A read-out whose bias starts there need not learn it through its tokens.

    Source: focal loss, arXiv:1708.02002, 3.3, extended to weights.

    Args:
        prevalence: ``(C,)`` in [0, 1], kept 0.00001 away from both ends; NaN, where unknown, stands for .01.
        pos_weight: ``(C,)`` or one number; positive.

    Returns:
        ``(C,)`` float64.

    Example:
        >>> prior_logits([0.5, 0.01], [1, 99])
        array([0., 0.])
    """
    share = np.asarray(prevalence, np.float64)
    share = np.where(np.isnan(share), UNKNOWN_PREVALENCE, share).clip(LEAST_PREVALENCE, 1 - LEAST_PREVALENCE)
    return np.log(np.asarray(pos_weight, np.float64)) + np.log(share) - np.log1p(-share)


def list_prior_logits(name: str) -> list[float]:
    """Return ``prior_logits`` of a label list, in its order, for a bundle's config."""
    labels = load_labels(name)
    logits = prior_logits([label.frequency for label in labels], [label.pos_weight for label in labels])
    return list(logits.tolist())


def table_rows(path: str | Path, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Read a CSV row by row, as column to cell; cells that a short row lacks are empty.

    Args:
        path: CSV in UTF-8, with or without a byte order mark.
        name: name of the table in errors, such as the option that names the file.
        columns: required columns; there may be others.

    Raises:
        FileNotFoundError: with the first row, if there is no such file.
        ValueError: with the first row, if a column is missing; with any, if the file is no CSV in UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Cannot find {name}: there is no CSV file '{path}'.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restkey="", restval="", strict=True)
            header = rows.fieldnames
            missing = [column for column in columns if column not in (header or [])]
            if not missing:
                yield from rows
    except (UnicodeDecodeError, csv.Error) as error:  # a quote that is never closed ends as the latter
        raise ValueError(f"{name} must be a CSV file in UTF-8, got '{path}' ({error}).") from error
    if missing:
        raise ValueError(f"{name} must have the column '{missing[0]}', got {header} in '{path}'.")


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, at least one, with the same columns as a CSV that appears only when whole."""
    with atomic_file(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_labels(labels_csv: str | Path, class_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a label table in the order of its rows.

    Args:
        labels_csv: CSV with a column ``VolumeName`` (name or path, with or without suffix) and one per class.
        class_names: columns to read, in this order; others are ignored.

    Returns:
        Volume to its labels, float32 ``(C,)`` of 0 and 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no CSV in UTF-8, a column is missing, a volume has two rows, or a label is
            neither 0 nor 1.
    """
    path = Path(labels_csv)
    labels: dict[str, np.ndarray] = {}
    rows = list(table_rows(path, "labels_csv", ("VolumeName", *class_names)))
    places = [Path(row["VolumeName"].strip().replace("\\", "/")) for row in rows]
    names = unique_names(places)
    for place, row in zip(places, rows, strict=True):
        volume = names[place]
        if volume in labels:
            raise ValueError(f"labels_csv has two rows for volume '{volume}' in '{path}'. Keep one of them.")
        labels[volume] = np.array([_binary(row, name, path) for name in class_names], dtype=np.float32)
    return labels


def _binary(row: dict[str, str], name: str, path: Path) -> float:
    value = row[name].strip()
    if value not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(
            f"label must be 0 or 1, got {value!r} of '{name}' for volume '{row['VolumeName']}' in '{path}'."
        )
    return float(value)


def listed_names(listing: str | Path, knob: str) -> list[str]:
    """Read the names or paths in a file: one per line, or a table's column ``VolumeName`` or else its first.

    Args:
        listing: text, or CSV with commas, semicolons or tabs; with or without a line of column names.
        knob: name of the file in errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text in UTF-8.
    """
    path = Path(listing)
    if not path.is_file():
        raise FileNotFoundError(f"Cannot find {knob}: there is no text file '{path}'.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [row for row in _cells(path, lines) if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{knob} must be text in UTF-8, got '{path}' ({error}).") from error
    heading = [re.sub(r"[\s_]", "", cell).lower() for cell in rows[0]] if rows else [""]
    column = heading.index("volumename") if "volumename" in heading else 0
    rows = rows[1:] if heading[column] in HEADINGS else rows
    names = (row[column].strip() for row in rows if len(row) > column)
    return [name for name in names if name]


def _cells(path: Path, lines: list[str]) -> Iterable[list[str]]:
    """Split the lines of a table into cells; in any other text each line is one name."""
    if path.suffix.lower() not in (".csv", ".tsv"):
        return ([line.strip(" \t\"'")] for line in lines)
    return csv.reader(lines, delimiter=max(",;\t", key=lines[0].count) if lines else ",")


def listed_volumes(skip_list: str | Path) -> set[str]:
    """Read the names of the volumes in a skip list such as CT-RATE's ``no_chest_*.txt``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no text in UTF-8.
    """
    return {volume_name(name) for name in listed_names(skip_list, "skip_list")}


def patient_of(volume: str) -> str:
    """Return the patient a volume belongs to: its name's first two fields.

    CT-RATE starts counting patients again in each of its splits, so that the number alone does not name one.
    RAD-ChestCT does not publish which volumes share a patient: each counts as a patient.

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
    """Draw patients for validation; the others are for training. Volumes stay in the given order.

    Source: DALE-CT IV-B, 1,000 patients. NumPy's legacy generator draws from the patients in natural order,
    so that the order of the volumes does not matter. The authors' released code draws in the order of the
    label table, which gives the same patients where the table is in natural order.

    Args:
        volumes: volumes of all patients; another set of patients gives another draw.
        num_val_patients: patients to draw.
        seed: seed of the draw; the authors use 42.

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


def low_shot_split(
    volumes: Sequence[str], num_val_patients: int, seed: int, fraction: float
) -> dict[str, list[str]]:
    """Split as :func:`split_by_patient` does, and keep a fraction of the training patients.

    The seed puts the training patients in one order, of which the first ceil(fraction x patients) are kept,
    so that 1 % is part of 10 %. All validation patients are kept: probe and thresholds are chosen equally
    well at every fraction, and the curve shows what training labels are worth.

    Raises:
        ValueError: if the fraction is not above 0 and at most 1, or as ``split_by_patient``.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}.")
    sides = split_by_patient(volumes, num_val_patients, seed)
    patients = sorted({patient_of(volume) for volume in sides["train"]}, key=natural_order)
    order = np.random.default_rng([seed, len(patients)]).permutation(len(patients))
    # rounded first: 0.07 of 100 patients is 7.000000000000001 of them in floating point
    kept = {patients[place] for place in order[: math.ceil(round(fraction * len(patients), 9))]}
    return sides | {"train": [volume for volume in sides["train"] if patient_of(volume) in kept]}


def split_three_ways(
    volumes: Sequence[str], seed: int, percent: tuple[int, int, int] = (70, 10, 20)
) -> dict[str, list[str]]:
    """Deal patients to training, validation and test. Volumes stay in the given order.

    Source: DALE-CT IV-A, 70/10/20 of the annotated scans' patients. NumPy's legacy generator permutes the
    patients in alphabetical order, as in the authors' released code. Our choice: the numbers for training
    and validation are rounded down, and the rest is for the test.

    Args:
        volumes: volumes of all patients.
        seed: seed of the draw; the authors use 42.
        percent: percent of the patients for training, validation and test.

    Raises:
        ValueError: if the percentages do not add up to 100, or one side would have no patient.
    """
    if sum(percent) != 100 or min(percent) <= 0:
        raise ValueError(f"percent must be positive and add up to 100, got {percent}.")
    patients = sorted({patient_of(volume) for volume in volumes})
    order = np.random.RandomState(seed).permutation(patients).tolist()
    num_train, num_val = (len(order) * part // 100 for part in percent[:2])
    parts = np.split(order, [num_train, num_train + num_val])
    sides = {
        name: set(part.tolist()) for name, part in zip(("train", "validation", "test"), parts, strict=True)
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
