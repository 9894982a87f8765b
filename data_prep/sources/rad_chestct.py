"""RAD-ChestCT: its label tables as the 16 classes of the probes."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.cohort.cohort import load_labels, table_rows
from common.ct.files import ct_file, only_file, volume_files, volume_name
from common.ct.nifti import Rescale
from common.ct.rejection import RejectedError, RejectedVolume
from data_prep.sources.source_volume import SourceVolume, with_masks

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "Calcification": ("calcification",),
    "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",),
    "Hiatal hernia": ("hernia",),
    "Emphysema": ("emphysema",),
    "Atelectasis": ("atelectasis",),
    "Lung nodule": ("nodule", "nodulegr1cm"),
    "Lung opacity": ("opacity",),
    "Pulmonary fibrotic sequela": ("fibrosis",),
    "Pleural effusion": ("pleural_effusion",),
    "Peribronchial thickening": ("bronchial_wall_thickening",),
    "Consolidation": ("consolidation",),
    "Bronchiectasis": ("bronchiectasis",),
    "Interlobular septal thickening": ("septal_thickening",),
    "Lymphadenopathy": ("lymphadenopathy",),
    "Medical material": (
        *("catheter_or_port", "chest_tube", "clip", "gi_tube"),
        *("hardware", "pacemaker_or_defib", "stent", "tracheal_tube"),
    ),
}
"""Abnormalities that make up a class. Source: the map of DALE-CT's authors; others count hardware only."""


def read_labels(tables: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Read the 16 classes that RAD-ChestCT shares with CT-RATE.

    A class is positive if any of its abnormalities is, at any location.

    Args:
        tables: the three ``img{train,valid,test}_Abnormality_and_Location_Labels.csv``, with the columns
            ``NoteAcc_DEID`` and ``abnormality*location``.

    Returns:
        Volume to class name to 0 or 1, classes in the order of the label list.

    Raises:
        FileNotFoundError: if a table is not there.
        ValueError: if a file is no CSV in UTF-8, an abnormality has no column, a volume comes twice, or a
            label is neither 0 nor 1.
    """
    labels: dict[str, dict[str, int]] = {}
    for table in tables:
        columns: dict[str, list[str]] = {}
        for row in table_rows(table, "labels", ("NoteAcc_DEID",)):
            columns = columns or _columns(list(row), table)
            volume = row["NoteAcc_DEID"].strip()
            if volume in labels:
                raise ValueError(f"a volume must have one row, got two for '{volume}', one in '{table}'.")
            labels[volume] = {
                name: max(_binary(row[column], column, volume) for column in own)
                for name, own in columns.items()
            }
    return labels


def _columns(header: Sequence[str], table: Path) -> dict[str, list[str]]:
    columns = {}
    for label in load_labels("rad_chestct"):
        prefixes = PREFIXES[label.name]
        missing = set(prefixes) - {column.split("*")[0] for column in header if "*" in column}
        if missing:
            raise ValueError(f"'{table}' must have columns of {prefixes}, got none of {sorted(missing)}.")
        columns[label.name] = [
            column for column in header if column.split("*")[0] in prefixes and "*" in column
        ]
    return columns


def _binary(value: str, column: str, volume: str) -> int:
    text = value.strip()
    if text not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(f"label must be 0 or 1, got {text!r} of '{column}' for volume '{volume}'.")
    return int(float(text))


logger = logging.getLogger(__name__)

PREFIX = {"train": "trn", "valid": "val", "test": "tst"}
METADATA = "CT_Scan_Metadata_Complete_35747.csv"


def find_rad_chestct(
    root: Path, split: str, totalsegmentator: Path | None = None
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the volumes of a split with their labels.

    A volume without a row in the label table is written without labels, which pre-training does not need. The
    metadata table, where there is one, states the spacing; it is 0.8 mm otherwise.

    Args:
        root: the downloaded dataset: npz files and tables, in any sub-folders.
        split: ``train``, ``valid`` or ``test``: files that begin with ``trn``, ``val`` or ``tst``.
        totalsegmentator: folder of label maps, named like the volumes, their affine that of
            ``common.ct.npz.npz_affine``.

    Returns:
        The volumes, and those that names and tables alone are enough to reject.

    Raises:
        FileNotFoundError: if the volumes or the stated label maps are not there.
        ValueError: if the split is unknown, or a table is not as published.
    """
    if split not in PREFIX:
        raise ValueError(f"split must be one of {sorted(PREFIX)}, got '{split}'.")
    found = npz_files(root, PREFIX[split])
    if not found:
        raise FileNotFoundError(f"root must hold volumes {PREFIX[split]}*.npz, got none in '{root}'.")
    labels = _labels(root, split)
    spacings = _spacings(root)
    sources: list[SourceVolume] = []
    rejected: list[RejectedVolume] = []
    for volume, files in found.items():
        try:
            ct = only_file(files, "volumes")
            rescale = _stated_spacing(spacings.get(volume, ""))
        except RejectedError as error:
            rejected.append(error.of(volume))
            continue
        relative = ct.relative_to(root).as_posix()
        sources.append(
            SourceVolume(
                *(volume, split, ct_file(ct)),
                rescale=rescale,
                labels=labels.get(volume),
                source=relative,
            )
        )
    if totalsegmentator is not None and sources:
        sources, without = with_masks(sources, totalsegmentator, "totalsegmentator")
        rejected += without
    unlabelled = sum(source.labels is None for source in sources)
    if labels and unlabelled:
        logger.warning("%d of %d volumes have no row in the label table.", unlabelled, len(sources))
    return sources, rejected


def npz_files(root: Path, prefix: str) -> dict[str, list[Path]]:
    """List the npz files below a folder by volume.

    Args:
        root: folder.
        prefix: how the names of the volumes start.
    """
    found = volume_files(root, [".npz"]).items()
    return {volume: paths for volume, paths in found if volume.lower().startswith(prefix)}


def read_all_labels(root: Path) -> dict[str, dict[str, int]]:
    """Read the 16 classes of the volumes of all three splits, which their names tell apart.

    Args:
        root: the downloaded dataset, its label tables in any sub-folders.

    Returns:
        Volume to class name to 0 or 1.

    Raises:
        FileNotFoundError: if a table is not there.
        ValueError: if a table is not as published, or there twice.
    """
    tables = []
    for split in PREFIX:
        name = f"img{split}_Abnormality_and_Location_Labels.csv"
        table = _table(root, name)
        if table is None:
            raise FileNotFoundError(f"root must hold '{name}', got none in '{root}'.")
        tables.append(table)
    return read_labels(tables)


def _labels(root: Path, split: str) -> dict[str, dict[str, int]]:
    table = _table(root, f"img{split}_Abnormality_and_Location_Labels.csv")
    if table is None:
        logger.warning("Shards will hold no labels: there is no label table of '%s' in '%s'.", split, root)
        return {}
    return read_labels([table])


def _spacings(root: Path) -> dict[str, str]:
    """Read what the metadata says of each volume's spacing; empty without the table."""
    table = _table(root, METADATA)
    if table is None:
        return {}
    rows = table_rows(table, "metadata", ("VolumeAcc_DEID", "final_spacing"))
    return {volume_name(row["VolumeAcc_DEID"]): row["final_spacing"] for row in rows}


def _stated_spacing(text: str) -> Rescale | None:
    """Read a spacing, one number or three equal ones; None where nothing is stated."""
    if not text.strip():
        return None
    try:
        stated = json.loads(text)
        spacing_mm = {float(mm) for mm in (stated if isinstance(stated, list) else [stated])}
    except (TypeError, ValueError):
        spacing_mm = set()
    if len(spacing_mm) != 1 or not math.isfinite(mm := spacing_mm.pop()):
        raise RejectedError("spacing", f"final_spacing must be the edge of cubes in mm, got '{text}'")
    return Rescale(slope=1, intercept=0, spacing_mm=(mm, mm, mm))


def _table(root: Path, name: str) -> Path | None:
    found = sorted(root.rglob(name))
    if len(found) > 1:
        raise ValueError(f"a table must be there once, got '{found[0]}' and '{found[1]}'. Keep one.")
    return found[0] if found else None
