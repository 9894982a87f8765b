"""CT-RATE: finds its volumes, metadata, labels and masks as the hub dataset lays them out."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.cohort.cohort import listed_volumes, load_labels, read_labels, table_rows
from common.ct.files import NIFTI_SUFFIXES, ct_file, only_file, volume_files, volume_name
from common.ct.nifti import Rescale
from common.ct.rejection import EXCLUDED, RejectedError, RejectedVolume
from data_prep.sources.rexgroundingct import Annotation
from data_prep.sources.source_volume import NIFTI_FORMS, SourceVolume, list_sources, with_masks

logger = logging.getLogger(__name__)

METADATA = {"train": "train_metadata.csv", "valid": "validation_metadata.csv"}
MASK_FOLDERS = {"ts_seg", "segmentations"}
METADATA_COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")


class Volumes(NamedTuple):
    """Files of one split by volume, and their form: v1 or v2 where the folder tells, else as asked."""

    form: str
    files: dict[str, list[Path]]


def find_ct_rate(
    root: Path,
    split: str,
    *,
    form: str = "auto",
    totalsegmentator: Path | None = None,
    annotations: Mapping[str, Annotation] | None = None,
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the volumes of a split with everything the dataset says about them.

    Looks for volumes in ``dataset/<split>_fixed`` (form v2), then ``dataset/<split>`` (v1), then anywhere
    under the root by name; for tables in ``dataset/metadata``, ``metadata`` or the root itself; for label
    maps in ``dataset/ts_seg/ts_total/<split>_fixed`` unless another folder is given.

    Args:
        root: the downloaded dataset.
        split: ``train`` or ``valid``.
        form: form of the volumes, ``v1`` or ``v2``; ``auto`` goes by the folder, then by each header.
        totalsegmentator: folder of label maps named like the volumes.
        annotations: ReXGroundingCT's annotations by volume.

    Returns:
        The volumes, and those that the tables alone are enough to reject.

    Raises:
        FileNotFoundError: if the volumes, the metadata or the given label maps are missing.
        ValueError: if the split or form is unknown, a table lacks a column, or a label is neither 0 nor 1.
    """
    if split not in METADATA:
        raise ValueError(f"split must be one of {sorted(METADATA)}, got '{split}'.")
    if form not in NIFTI_FORMS:
        raise ValueError(f"form must be one of {NIFTI_FORMS}, got '{form}'.")
    found = find_volumes(root, split, form)
    rows = read_metadata(_table(root, METADATA[split]))
    no_chest = read_no_chest(_optional_table(root, f"no_chest_{split}.txt"))
    labels = _labels(root, split)
    label_maps = _label_maps(root, split, totalsegmentator)

    def source_of(volume: str, files: Sequence[Path]) -> SourceVolume:
        if volume in no_chest:
            raise RejectedError(EXCLUDED, f"listed in no_chest_{split}.txt")
        path = only_file(files, "volumes")
        return SourceVolume(
            volume=volume,
            split=split,
            ct=ct_file(path),
            form=found.form,
            rescale=_rescale(volume, rows),
            rex=(annotations or {}).get(volume),
            labels=labels.get(volume),
            source=path.relative_to(root).as_posix(),
        )

    return with_masks(*list_sources(found.files, source_of), label_maps, "totalsegmentator")


def find_volumes(root: Path, split: str, form: str) -> Volumes:
    """Find the NIfTI files of a split in the folders of a form: ``auto``, ``v1`` or ``v2``.

    Raises:
        FileNotFoundError: if there is none.
    """
    fixed, raw = root / "dataset" / f"{split}_fixed", root / "dataset" / split
    places = {"auto": [(fixed, "v2"), (raw, "v1")], "v1": [(raw, "v1")], "v2": [(fixed, "v2"), (raw, "v2")]}[
        form
    ]
    for folder, folder_form in [*places, (root, form)]:
        files = _named(folder, split) if folder.is_dir() else {}
        if files:
            logger.info("%d volumes in '%s', read as form %s.", len(files), folder, folder_form)
            return Volumes(folder_form, files)
    looked = ", ".join(f"'{folder}'" for folder, _ in places)
    raise FileNotFoundError(f"No volumes {split}_*.nii.gz in {looked} or anywhere in '{root}'.")


def _named(folder: Path, split: str) -> dict[str, list[Path]]:
    """Files of a split under a folder; masks have the same names, but lie in folders of their own."""
    found: dict[str, list[Path]] = {}
    for volume, paths in volume_files(folder, NIFTI_SUFFIXES).items():
        scans = [path for path in paths if MASK_FOLDERS.isdisjoint(path.relative_to(folder).parts)]
        if scans and volume.startswith(f"{split}_"):
            found[volume] = scans
    return found


def read_metadata(table: Path) -> dict[str, list[Mapping[str, str]]]:
    """Read CT-RATE's metadata, in which volumes may be missing or listed twice.

    Args:
        table: ``train_metadata.csv`` or ``validation_metadata.csv``.

    Returns:
        Volume to its rows.

    Raises:
        ValueError: if the file is not a CSV in UTF-8, or lacks a column.
    """
    rows: dict[str, list[Mapping[str, str]]] = {}
    for row in table_rows(table, "metadata", METADATA_COLUMNS):
        rows.setdefault(volume_name(row["VolumeName"]), []).append(row)
    return rows


def read_no_chest(listing: Path | None) -> set[str]:
    """Read ``no_chest_<split>.txt``: volumes that are no chest CT; empty where the download has no list."""
    if listing is None:
        logger.warning("Scans of other body parts are not left out: there is no list no_chest_<split>.txt.")
        return set()
    return listed_volumes(listing)


def _rescale(volume: str, rows: Mapping[str, Sequence[Mapping[str, str]]]) -> Rescale:
    found = rows.get(volume, [])
    if len(found) != 1:
        raise RejectedError("metadata", f"'{volume}' must have one row in the metadata, got {len(found)}")
    row = found[0]
    return Rescale(_number(row["RescaleSlope"]), _number(row["RescaleIntercept"]), _spacing_mm(row))


def _spacing_mm(row: Mapping[str, str]) -> tuple[float, float, float]:
    try:
        x, y = json.loads(row["XYSpacing"])
    except (TypeError, ValueError):
        return math.nan, math.nan, _number(row["ZSpacing"])
    return _number(x), _number(y), _number(row["ZSpacing"])


def _number(value: str | float | None) -> float:
    """Return a field as a number, NaN if it is none: later checks report it."""
    try:
        return float(value)  # type: ignore[arg-type]  # None is one of the things it may turn out to be
    except (TypeError, ValueError):
        return math.nan


def _labels(root: Path, split: str) -> dict[str, dict[str, int]]:
    path = root / "dataset" / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"
    if not path.is_file():
        logger.warning("Shards will hold no labels: there is no '%s'.", path)
        return {}
    names = [label.name for label in load_labels("ct_rate")]
    return {
        volume: dict(zip(names, map(int, values), strict=True))
        for volume, values in read_labels(path, names).items()
    }


def _label_maps(root: Path, split: str, stated: Path | None) -> Path | None:
    folder = stated or root / "dataset" / "ts_seg" / "ts_total" / f"{split}_fixed"
    if folder.is_dir():
        return folder
    if stated is not None:
        raise FileNotFoundError(f"No folder '{stated}' of label maps.")
    logger.warning("Shards will hold no TotalSegmentator ids: there is no '%s'.", folder)
    return None


def _table(root: Path, name: str) -> Path:
    path = _optional_table(root, name)
    if path is None:
        raise FileNotFoundError(f"No dataset/metadata/{name} in '{root}'.")
    return path


def _optional_table(root: Path, name: str) -> Path | None:
    places = (root / "dataset" / "metadata" / name, root / "metadata" / name, root / name)
    return next((path for path in places if path.is_file()), None)
