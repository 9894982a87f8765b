"""RAD-ChestCT: finds its volumes and label maps, and reads its labels as the 16 classes of the probes."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.cohort.cohort import load_labels, table_rows
from common.ct.files import ct_file, only_file, volume_files, volume_name
from common.ct.nifti import Rescale
from common.ct.rejection import RejectedError, RejectedVolume
from data_prep.sources.source_volume import SourceVolume, list_sources, with_masks

logger = logging.getLogger(__name__)

PREFIX = {"train": "trn", "valid": "val", "test": "tst"}
METADATA = "CT_Scan_Metadata_Complete_35747.csv"

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
"""Abnormalities that make up a class. Source: DALE-CT's authors; others count only hardware as material."""


def find_rad_chestct(
    root: Path, split: str, totalsegmentator: Path | None = None
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the volumes of a split with their labels.

    A volume without a row in the label table is written without labels, which pre-training does not need. The
    metadata table, if there is one, states the spacing; otherwise it is 0.8 mm.

    Args:
        root: the downloaded dataset: npz files and tables, in any sub-folders.
        split: ``train``, ``valid`` or ``test``: files that begin with ``trn``, ``val`` or ``tst``.
        totalsegmentator: folder of label maps, named like the volumes, with the affine of
            ``common.ct.npz.npz_affine``.

    Returns:
        The volumes, and those that names and tables alone are enough to reject.

    Raises:
        FileNotFoundError: if the volumes or the given label maps are missing.
        ValueError: if the split is unknown, or a table is not as published.
    """
    if split not in PREFIX:
        raise ValueError(f"split must be one of {sorted(PREFIX)}, got '{split}'.")
    found = npz_files(root, PREFIX[split])
    if not found:
        raise FileNotFoundError(f"No volumes {PREFIX[split]}*.npz in '{root}'.")
    labels = _labels(root, split)
    spacings = _spacings(root)

    def source_of(volume: str, files: Sequence[Path]) -> SourceVolume:
        path = only_file(files, "volumes")
        return SourceVolume(
            volume=volume,
            split=split,
            ct=ct_file(path),
            rescale=_stated_spacing(spacings.get(volume, "")),
            labels=labels.get(volume),
            source=path.relative_to(root).as_posix(),
        )

    sources, rejected = with_masks(*list_sources(found, source_of), totalsegmentator, "totalsegmentator")
    unlabelled = sum(source.labels is None for source in sources)
    if labels and unlabelled:
        logger.warning("%d of %d volumes have no row in the label table.", unlabelled, len(sources))
    return sources, rejected


def npz_files(root: Path, prefix: str) -> dict[str, list[Path]]:
    """List the npz files below a folder by volume, of volumes whose names start with a prefix."""
    found = volume_files(root, [".npz"]).items()
    return {volume: paths for volume, paths in found if volume.lower().startswith(prefix)}


def read_all_labels(root: Path) -> dict[str, dict[str, int]]:
    """Read the 16 classes of the volumes of all three splits, which their names tell apart.

    Returns:
        Volume to class name to 0 or 1.

    Raises:
        FileNotFoundError: if a table is missing.
        ValueError: if a table is not as published, or there twice.
    """
    tables = []
    for split in PREFIX:
        name = f"img{split}_Abnormality_and_Location_Labels.csv"
        table = _table(root, name)
        if table is None:
            raise FileNotFoundError(f"No '{name}' in '{root}'.")
        tables.append(table)
    return read_labels(tables)


def _labels(root: Path, split: str) -> dict[str, dict[str, int]]:
    table = _table(root, f"img{split}_Abnormality_and_Location_Labels.csv")
    if table is None:
        logger.warning("Shards will hold no labels: there is no label table of '%s' in '%s'.", split, root)
        return {}
    return read_labels([table])


def _spacings(root: Path) -> dict[str, str]:
    """Read each volume's spacing from the metadata; empty without the table."""
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
        raise ValueError(f"The same table is there twice: '{found[0]}' and '{found[1]}'. Keep one.")
    return found[0] if found else None


def read_labels(tables: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Read the 16 classes that RAD-ChestCT shares with CT-RATE.

    A class is positive if any of its abnormalities is, at any location.

    Args:
        tables: ``img{train,valid,test}_Abnormality_and_Location_Labels.csv``, with the columns
            ``NoteAcc_DEID`` and ``abnormality*location``.

    Returns:
        Volume to class name to 0 or 1, classes in the order of the label list.

    Raises:
        FileNotFoundError: if a table is missing.
        ValueError: if a file is not a CSV in UTF-8, an abnormality has no column, a volume has two rows, or a
            label is neither 0 nor 1.
    """
    labels: dict[str, dict[str, int]] = {}
    for table in tables:
        columns: dict[str, list[str]] = {}
        for row in table_rows(table, "labels", ("NoteAcc_DEID",)):
            columns = columns or _columns(list(row), table)
            volume = row["NoteAcc_DEID"].strip()
            if volume in labels:
                raise ValueError(f"Volume '{volume}' has two rows in the label tables, one in '{table}'.")
            labels[volume] = {
                name: max(_binary(row[column], column, volume) for column in of_class)
                for name, of_class in columns.items()
            }
    return labels


def _columns(header: Sequence[str], table: Path) -> dict[str, list[str]]:
    columns = {}
    for label in load_labels("rad_chestct"):
        prefixes = PREFIXES[label.name]
        missing = set(prefixes) - {column.split("*")[0] for column in header if "*" in column}
        if missing:
            raise ValueError(f"'{table}' has no columns of {sorted(missing)}.")
        columns[label.name] = [
            column for column in header if column.split("*")[0] in prefixes and "*" in column
        ]
    return columns


def _binary(value: str, column: str, volume: str) -> int:
    text = value.strip()
    if text not in {"0", "1", "0.0", "1.0"}:
        raise ValueError(f"label must be 0 or 1, got {text!r} of '{column}' for volume '{volume}'.")
    return int(float(text))
