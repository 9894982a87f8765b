"""Finds the volumes, labels and label maps of a RAD-ChestCT download."""

import json
import logging
import math
from pathlib import Path

from common.cohort.csv_table import table_rows
from common.ct.nifti import Rescale
from common.ct.nifti_file import find_nifti, only_file
from common.ct.rejection import RejectedError, RejectedVolume
from data_prep.rad_chestct import read_labels
from data_prep.source_volume import SourceVolume

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
        totalsegmentator: folder of label maps in NIfTI, named like the volumes, their affine that of
            ``common.ct.npz.npz_affine``.

    Returns:
        The volumes, and those that names and tables alone are enough to reject.

    Raises:
        FileNotFoundError: if the volumes or the stated label maps are not there.
        ValueError: if the split is unknown, or a table is not as published.
    """
    if split not in PREFIX:
        raise ValueError(f"split must be one of {sorted(PREFIX)}, got '{split}'.")
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob(f"{PREFIX[split]}*.npz")):
        found.setdefault(path.stem, []).append(path)
    if not found:
        raise FileNotFoundError(f"root must hold volumes {PREFIX[split]}*.npz, got none in '{root}'.")
    labels = _labels(root, split)
    spacings = _spacings(root)
    label_maps = _label_maps(found, totalsegmentator)
    sources, rejected = [], []
    for volume, files in found.items():
        try:
            ct = only_file(files, "a volume")
            ts = only_file(label_maps[volume], "a label map") if volume in label_maps else None
            rescale = _stated_spacing(spacings.get(volume, ""))
        except RejectedError as error:
            rejected.append(error.of(volume))
            continue
        relative = ct.relative_to(root).as_posix()
        sources.append(
            SourceVolume(
                *(volume, split, ct, "rad_chestct"),
                rescale=rescale,
                ts=ts,
                labels=labels.get(volume),
                source=relative,
            )
        )
    unlabelled = sum(source.labels is None for source in sources)
    if labels and unlabelled:
        logger.warning("%d of %d volumes have no row in the label table.", unlabelled, len(sources))
    return sources, rejected


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
    return {row["VolumeAcc_DEID"].strip().removesuffix(".npz"): row["final_spacing"] for row in rows}


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


def _label_maps(volumes: dict[str, list[Path]], folder: Path | None) -> dict[str, list[Path]]:
    if folder is None:
        return {}
    maps = find_nifti(folder) if folder.is_dir() else {}
    if not maps.keys() & volumes.keys():
        raise FileNotFoundError(
            f"totalsegmentator must hold NIfTI label maps named like the volumes, got none in '{folder}'."
        )
    return maps


def _table(root: Path, name: str) -> Path | None:
    found = sorted(root.rglob(name))
    if len(found) > 1:
        raise ValueError(f"a table must be there once, got '{found[0]}' and '{found[1]}'. Keep one.")
    return found[0] if found else None
