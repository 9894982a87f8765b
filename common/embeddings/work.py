"""What an embedding run has to do, which of it falls to this process, and what came of it."""

# Z slices, H side of a slice padded to a square

import csv
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.cohort.cohort import listed_names
from common.ct.checks import find_doubts
from common.ct.files import CTFile, Places, find_cts, find_named, read_ct, read_grid, study_of
from common.ct.geometry import STORED_HU_RANGE, check_size, shown_mm
from common.ct.rejection import Doubt, RejectedError, RejectedVolume, is_failure
from common.embeddings.store import EmbeddingStore, stored_volumes
from common.run.process import atomic_file, gather_objects, rank_and_ranks, wait_for_ranks
from common.shards.shards import SHARD_NAME, ShardSet
from common.transforms.slice_strategies import pad_to_square

logger = logging.getLogger(__name__)
REJECTED = "rejected.csv"
ALL = "all"  # series of a study


class CTSlices(NamedTuple):
    """A CT as canonical slices: feet to head, rows to the back, columns to the patient's left.

    Args:
        hu: int16 ``(Z, H, H)``, padded with air on both sides to squares.
        spacing_mm: (x, y, z).
        sha256: checksum of the files it was read from.
        doubts: what makes it unlike a chest CT, see :func:`common.ct.checks.find_doubts`.
        blank: numbers of its blank slices, from 0.
    """

    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    sha256: str = ""
    doubts: Sequence[Doubt] = ()
    blank: Sequence[int] = ()

    @property
    def notes(self) -> dict[str, Any]:
        """JSON values to keep with an embedding: checksum, doubts and blank slices, where there are any."""
        texts = [doubt.text for doubt in self.doubts]
        notes = {"sha256": self.sha256, "doubts": texts, "blank_slices": list(self.blank)}
        return {name: value for name, value in notes.items() if value}


class CTSource(NamedTuple):
    """A volume to be read.

    Args:
        volume: name of the volume.
        read: reads it; raises ``RejectedError`` if it must not be used.
        stores: names of the stores that have no embedding of it yet.
    """

    volume: str
    read: Callable[[], CTSlices]
    stores: tuple[str, ...] = ()


def ct_sources(
    dataset_dir: str | Path,
    split: str = "",
    subset_csv: str | Path | None = None,
    skip_list: str | Path | None = None,
    series: str | None = None,
) -> tuple[list[CTSource], list[RejectedVolume]]:
    """List the volumes of a file or folder.

    A volume has the name of its file without suffix, or of its folder where files of several folders have one
    name; a DICOM series its SeriesInstanceUID; one of a shard the name stated there. Dots and blanks become
    ``_``. Volumes in a zip file are named in the same way.

    Args:
        dataset_dir: a file of NIfTI (``.nii``, ``.nii.gz``, ``.hdr``), MetaImage (``.mha``, ``.mhd``), NRRD
            (``.nrrd``, ``.nhdr``) or ``.npz``; a zip file of at most 8 GiB of these or of DICOM files, as
            PACS export them; a folder of all these and of DICOM series, searched with its sub-folders; or a
            folder of shards. Files in HU with a header that states its geometry; npz with ``ct`` (I, P, L) at
            0.8 mm, as RAD-ChestCT's.
        split: split of the shards.
        subset_csv: table or text file of the volumes to use, see ``listed_names``; None for all.
        skip_list: table or text file of volumes to leave out, as CT-RATE's ``no_chest_*.txt``.
        series: the one volume to use, by name or SeriesInstanceUID; "all" to take several series of one
            study, which are refused otherwise.

    Returns:
        The volumes, sorted by name, and what was left out: two of one name, damaged files and zips, series
        that are no axial CT.

    Raises:
        FileNotFoundError: if there is no such file, folder or list, no volume, none but series that are no
            axial CT, or none of the subset.
        ValueError: if nothing but several series of one study is there, with a table of them, or ``series``
            is none of the volumes.
    """
    root = Path(dataset_dir)
    if not root.exists():
        raise FileNotFoundError(f"No file or folder '{root}' (--dataset_dir).")
    found: dict[str, Callable[[], CTSlices]]
    rejected: list[RejectedVolume] = []
    if root.is_dir() and any(SHARD_NAME.fullmatch(name) for name in os.listdir(root)):
        shards = ShardSet(root, split)
        found = {entry.volume: partial(_read_shard, shards, i) for i, entry in enumerate(shards.volumes)}
        places = {entry.volume: Path(entry.source) for entry in shards.volumes}
    else:
        cts, rejected = find_cts(root)
        if series is None and subset_csv is None:
            _refuse_one_study(cts, root)
        found = {ct.volume: partial(_read_file, ct) for ct in cts}
        places = {item.volume: Path() for item in rejected if item.reason == "duplicate"}
        places |= {ct.volume: ct.path for ct in cts}
    if not found and not any(map(is_failure, rejected)):
        left_out = f" {len(rejected)} were left out, such as: {rejected[0].detail}" if rejected else ""
        raise FileNotFoundError(
            f"No volumes in '{root}'. It must hold files of NIfTI, MetaImage, NRRD or npz, DICOM series, "
            f"zips of these, or shards.{left_out}"
        )
    chosen = {*places} if subset_csv is None else _named(subset_csv, "subset_csv", places, root)
    skipped = set() if skip_list is None else _named(skip_list, "skip_list", places, root)
    if not chosen and subset_csv is not None:
        raise FileNotFoundError(f"None of the names in subset_csv '{subset_csv}' is in '{root}'.")
    if series not in (None, ALL):
        named, _ = find_named([series], {volume: Path() for volume in chosen})
        if not named:
            some = ", ".join(sorted(chosen)[:10])
            raise ValueError(
                f"series must be one of the {len(chosen)} volumes of '{root}', got '{series}': {some}."
            )
        chosen &= named
    used = [CTSource(volume, found[volume]) for volume in sorted(found.keys() & chosen - skipped)]
    logger.info("%d of %d volumes in '%s' are chosen.", len(used), len(found), root)
    # a damaged file has no volume's name: it may belong to any
    others = places.keys() - (chosen - skipped)
    return used, [item for item in rejected if item.volume not in others]


def _refuse_one_study(cts: Sequence[CTFile], root: Path) -> None:
    """Refuse several series of one study: one is meant, and a scan counted twice is worse than a question."""
    descriptions, studies = [], set()
    for ct in cts:
        study, description = study_of(ct)
        studies.add(study)
        if not study or len(studies) > 1:
            return
        descriptions.append(description)
    if len(cts) < 2:
        return
    rows = [("series", "slices", "spacing in mm", "description", "path")]
    for ct, description in zip(cts, descriptions, strict=True):
        try:
            grid = read_grid(ct)
            size = str(grid.shape[2]), shown_mm(np.linalg.norm(grid.affine[:3, :3], axis=0))
        except RejectedError as error:
            size = "-", error.reason
        rows.append((ct.volume, *size, description, str(ct.path)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    how = f"Choose one with --series <name>, or take all with --series {ALL}:"
    raise ValueError("\n  ".join([f"'{root}' holds {len(cts)} series of one study. {how}", *table]))


def _named(listing: str | Path, knob: str, places: Places, root: Path) -> set[str]:
    """Find the volumes that a list names; names of no volume are counted in a warning."""
    names = listed_names(listing, knob)
    found, absent = find_named(names, places)
    if absent:
        logger.warning(
            "%d of %d names in %s '%s' are no volume of '%s', such as '%s'.",
            *(len(absent), len(names), knob, listing, root, absent[0]),
        )
    return found


def _read_file(file: CTFile) -> CTSlices:
    """Read a volume in HU; every message names its file."""
    try:
        ct = read_ct(file)
        return CTSlices(_squares(ct.hu), ct.spacing_mm, ct.sha256, ct.doubts, ct.blank)
    except RejectedError as error:
        if str(file.path) in error.detail or f"'{file.path.name}'" in error.detail:
            raise
        raise RejectedError(error.reason, f"'{file.path}': {error.detail}") from error


def _read_shard(shards: ShardSet, volume_id: int) -> CTSlices:
    entry = shards.volumes[volume_id]
    slab = shards.read_slab(volume_id, 0, entry.num_slices)
    hu = np.empty((entry.num_slices, *entry.shape), np.int16)
    for z in range(entry.num_slices):
        hu[z] = slab.read_ct(z)
    doubts, blank = find_doubts(hu, entry.spacing_mm)
    return CTSlices(_squares(hu), entry.spacing_mm, entry.source_sha256, doubts, blank)


def _squares(hu: np.ndarray) -> np.ndarray:
    side = max(hu.shape[1:])
    check_size((len(hu), side, side))
    return pad_to_square(hu, STORED_HU_RANGE[0])


def store_folders(output_dir: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Say where each store of a run lies: one alone in the folder itself, several in a sub-folder each.

    Args:
        output_dir: folder of the run.
        names: strategies of the run, or the preprocessing of a 3D encoder.

    Example:
        >>> str(store_folders("embeddings/train", ["raw_144", "cropped_256"])["raw_144"])
        'embeddings/train/raw_144'
        >>> str(store_folders("embeddings/train", ["raw_144"])["raw_144"])
        'embeddings/train'
    """
    root = Path(output_dir)
    return {name: root if len(names) == 1 else root / name for name in names}


def embedding_work(sources: Sequence[CTSource], folders: Mapping[str, Path]) -> list[CTSource]:
    """List this process's share of the volumes that are not embedded yet.

    With several processes (torchrun) every n-th volume falls to each. They agree, as none of them writes
    before all have looked.

    Args:
        sources: all volumes.
        folders: folders of :func:`store_folders`.
    """
    done = {name: stored_volumes(folder) for name, folder in folders.items()}
    work = []
    for source in sources:
        missing = tuple(name for name in folders if source.volume not in done[name])
        if missing:
            work.append(source._replace(stores=missing))
    logger.info("%d of %d volumes are to be embedded.", len(work), len(sources))
    wait_for_ranks()
    rank, num_ranks = rank_and_ranks()
    return work[rank::num_ranks]


def report_rejected(
    output_dir: str | Path, rejected: Sequence[RejectedVolume], num_volumes: int, max_rejected: float
) -> int:
    """Write ``rejected.csv`` of all ranks' volumes, or remove that of an earlier run, and judge their share.

    All ranks must call it; rank 0 writes.

    Args:
        output_dir: folder of the list.
        rejected: volumes of this rank.
        num_volumes: number of volumes of the whole run.
        max_rejected: share of volumes that may fail.

    Returns:
        Number of volumes that failed.

    Raises:
        ValueError: if more failed.
    """
    path = Path(output_dir) / REJECTED
    everyones = sorted({volume for of_rank in gather_objects(list(rejected)) for volume in of_rank})
    if rank_and_ranks()[0] == 0:
        _write(path, everyones)
    failed = [volume for volume in everyones if is_failure(volume)]
    num_failed = len({volume.volume for volume in failed})
    share = num_failed / max(num_volumes, 1)
    if share > max_rejected:
        raise ValueError(
            f"{share:.2%} of the volumes were rejected, more than --max_rejected {max_rejected:.2%}: "
            f"{len(failed)}, such as '{failed[0].volume}': {failed[0].detail}. '{path}' lists them. "
            "Fix them, or raise --max_rejected."
        )
    return num_failed


def _write(path: Path, rejected: Sequence[RejectedVolume]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(RejectedVolume._fields)
        table.writerows(rejected)


def report_embedded(
    output_dir: str | Path, folders: Collection[Path], num_volumes: int, num_failed: int
) -> None:
    """Say on rank 0, at the end of a run, what lies where, what of it is doubtful, and what is missing.

    Args:
        output_dir: folder of the run.
        folders: folders of its stores, into which all ranks have written.
        num_volumes: number of volumes of the whole run.
        num_failed: number of these that have no embedding.
    """
    if rank_and_ranks()[0] > 0:
        return
    doubts: dict[str, tuple[str, Path]] = {}
    for folder in folders:
        of_store = EmbeddingStore(folder).doubts() if stored_volumes(folder) else {}
        doubts |= {volume: (texts[0], folder) for volume, texts in of_store.items() if volume not in doubts}
    if doubts:
        volume, (text, folder) = next(iter(doubts.items()))
        logger.warning(
            "%d embedded volumes are doubtful, such as '%s': %s. EmbeddingStore('%s').doubts() lists them.",
            *(len(doubts), volume, text, folder),
        )
    doubtful = f", {len(doubts)} of them doubtful" if doubts else ""
    left_out = f"; {num_failed} rejected, listed in '{Path(output_dir) / REJECTED}'" if num_failed else ""
    logger.info(
        "Done: embeddings of %d volumes in '%s'%s%s.",
        *(num_volumes - num_failed, output_dir, doubtful, left_out),
    )
