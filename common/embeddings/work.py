"""What an embedding run still has to do, and which of it falls to this process."""

import csv
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np

from common.cohort.cohort import listed_names
from common.ct.checks import find_doubts
from common.ct.files import CTFile, Places, find_cts, find_named, read_ct
from common.ct.geometry import STORED_HU_RANGE, check_size
from common.ct.rejection import Doubt, RejectedError, RejectedVolume, is_failure
from common.embeddings.store import EmbeddingStore, stored_volumes
from common.run.process import atomic_file, gather_objects, wait_for_ranks
from common.shards.shards import SHARD_NAME, ShardSet
from common.transforms.slice_strategies import SliceStrategy, pad_to_square

# Z slices, H rows, W columns

logger = logging.getLogger(__name__)


class CTSlices(NamedTuple):
    """A CT as canonical slices: feet to head, rows to the back, columns to the patient's left.

    Args:
        hu: int16 ``(Z, H, H)``, padded with air on both sides to squares.
        spacing_mm: (x, y, z).
        sha256: of the files it was read from, see :class:`common.ct.geometry.CT`.
        doubts: what makes it unlike a chest CT, see :func:`common.ct.checks.find_doubts`.
        blank: numbers of its blank slices, from 0.
    """

    hu: np.ndarray
    spacing_mm: tuple[float, float, float]
    sha256: str = ""
    doubts: Sequence[Doubt] = ()
    blank: Sequence[int] = ()

    @property
    def notes(self) -> dict[str, list[Any]]:
        """Doubts and blank slices as JSON values to keep with an embedding; empty where all is well."""
        texts = [doubt.text for doubt in self.doubts]
        notes: dict[str, list[Any]] = {"doubts": texts, "blank_slices": list(self.blank)}
        return {name: values for name, values in notes.items() if values}


class CTSource(NamedTuple):
    """A volume to be read.

    Args:
        volume: name.
        read: reads it; raises ``RejectedError`` if it must not be used.
    """

    volume: str
    read: Callable[[], CTSlices]


def ct_sources(
    dataset_dir: str | Path,
    split: str = "",
    subset_csv: str | Path | None = None,
    skip_list: str | Path | None = None,
) -> tuple[list[CTSource], list[RejectedVolume]]:
    """List the volumes of a file or folder.

    A volume is called as its file without suffix, or as its folder where files of several folders have one
    name; of a DICOM series by its SeriesInstanceUID; of shards as they say. Dots and blanks become ``_``. It
    is called so in a zip file, too.

    Args:
        dataset_dir: a file of NIfTI (``.nii``, ``.nii.gz``, ``.hdr``), MetaImage (``.mha``, ``.mhd``), NRRD
            (``.nrrd``, ``.nhdr``) or ``.npz``; a zip file of at most 8 GiB of these or of DICOM files, as
            PACS export them; a folder of all these and of DICOM series, searched with its sub-folders; or a
            folder of shards. Files in HU with a header that states its geometry; npz with ``ct`` (I, P, L) at
            0.8 mm, as RAD-ChestCT's.
        split: which shards.
        subset_csv: table or text file of the volumes to use, see ``listed_names``; None for all.
        skip_list: table or text file of volumes to leave out, as CT-RATE's ``no_chest_*.txt``.

    Returns:
        The volumes, sorted by name, and what was left out: two of one name, damaged files and zips, series
        that are no axial CT.

    Raises:
        FileNotFoundError: if there is no such file, folder or list, no volume, none but series that are no
            axial CT, or none of the subset.
    """
    root = Path(dataset_dir)
    if not root.exists():
        raise FileNotFoundError(
            f"dataset_dir must be a file or a folder, got '{root}', which does not exist."
        )
    found, places, rejected = _shard_volumes(root, split) if _holds_shards(root) else _file_volumes(root)
    if not found and not any(map(is_failure, rejected)):
        left_out = f", but {len(rejected)} such as: {rejected[0].detail}" if rejected else ""
        raise FileNotFoundError(
            "dataset_dir must hold volumes in NIfTI, MetaImage, NRRD or npz, DICOM series, zips of these, or "
            f"shards, got none in '{root}'{left_out}."
        )
    chosen = {*places} if subset_csv is None else _named(subset_csv, "subset_csv", places, root)
    skipped = set() if skip_list is None else _named(skip_list, "skip_list", places, root)
    if not chosen and subset_csv is not None:
        raise FileNotFoundError(f"None of the names in subset_csv '{subset_csv}' is in '{root}'.")
    used = [CTSource(volume, found[volume]) for volume in sorted(found.keys() & chosen - skipped)]
    logger.info("%d of %d volumes in '%s' are to be embedded.", len(used), len(found), root)
    # a damaged file has no volume's name: it may belong to any
    others = places.keys() - (chosen - skipped)
    return used, [item for item in rejected if item.volume not in others]


Reads = dict[str, Callable[[], CTSlices]]
Found = tuple[Reads, Places, list[RejectedVolume]]


def _holds_shards(root: Path) -> bool:
    return root.is_dir() and any(SHARD_NAME.fullmatch(name) for name in os.listdir(root))


def _shard_volumes(root: Path, split: str) -> Found:
    shards = ShardSet(root, split)
    reads: Reads = {entry.volume: partial(_read_shard, shards, i) for i, entry in enumerate(shards.volumes)}
    return reads, {entry.volume: Path(entry.source) for entry in shards.volumes}, []


def _file_volumes(root: Path) -> Found:
    cts, rejected = find_cts(root)
    places = {item.volume: Path() for item in rejected if item.reason == "duplicate"}
    places |= {ct.volume: ct.path for ct in cts}
    reads: Reads = {ct.volume: partial(_read_file, ct) for ct in cts}
    return reads, places, rejected


def _named(listing: str | Path, knob: str, places: Places, root: Path) -> set[str]:
    """Find the volumes that a list names; a warning counts the names of none."""
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
        check_size((len(ct.hu), *2 * [max(ct.hu.shape[1:])]))  # of the squares
        hu = pad_to_square(ct.hu, STORED_HU_RANGE[0])
        return CTSlices(hu, ct.spacing_mm, ct.sha256, ct.doubts, ct.blank)
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
    return CTSlices(
        pad_to_square(hu, STORED_HU_RANGE[0]), entry.spacing_mm, entry.source_sha256, doubts, blank
    )


class Work(NamedTuple):
    """A volume and what is to be made of it.

    Args:
        source: the volume.
        strategies: that have no embedding of it yet.
    """

    source: CTSource
    strategies: tuple[SliceStrategy, ...]


def store_folders(output_dir: str | Path, strategies: Sequence[SliceStrategy]) -> dict[str, Path]:
    """Say where each strategy's store lies: one alone in the folder itself, several in a sub-folder each.

    Args:
        output_dir: folder of the run.
        strategies: of the run.

    Example:
        >>> strategies = [SliceStrategy(name, 16) for name in ("raw_144", "cropped_256")]
        >>> str(store_folders("embeddings/train", strategies)["raw_144"])
        'embeddings/train/raw_144'
        >>> str(store_folders("embeddings/train", strategies[:1])["raw_144"])
        'embeddings/train'
    """
    root = Path(output_dir)
    return {one.name: root if len(strategies) == 1 else root / one.name for one in strategies}


def embedding_work(
    sources: Sequence[CTSource], strategies: Sequence[SliceStrategy], folders: Mapping[str, Path]
) -> list[Work]:
    """List this process's share of the volumes that are not embedded yet.

    With several processes (torchrun) every n-th volume falls to each. They agree, as none of them writes
    before all have looked.

    Args:
        sources: all volumes.
        strategies: of the run.
        folders: see :func:`store_folders`.
    """
    done = {strategy.name: stored_volumes(folders[strategy.name]) for strategy in strategies}
    work = []
    for source in sources:
        missing = tuple(strategy for strategy in strategies if source.volume not in done[strategy.name])
        if missing:
            work.append(Work(source, missing))
    wait_for_ranks()
    return work[idist.get_rank() :: idist.get_world_size()]


REJECTED = "rejected.csv"


def report_rejected(
    output_dir: str | Path, rejected: Sequence[RejectedVolume], num_volumes: int, max_rejected: float
) -> int:
    """Write ``rejected.csv`` of all ranks' volumes, or remove that of an earlier run, and judge their share.

    All ranks must call it; rank 0 writes.

    Args:
        output_dir: folder of the list.
        rejected: of this rank.
        num_volumes: of the whole run.
        max_rejected: share of volumes that may fail.

    Returns:
        Number of volumes that failed.

    Raises:
        ValueError: if more failed.
    """
    path = Path(output_dir) / REJECTED
    everyones = sorted({volume for of_rank in gather_objects(list(rejected)) for volume in of_rank})
    if idist.get_rank() == 0:
        _write(path, everyones)
    failed = [volume for volume in everyones if is_failure(volume)]
    num_failed = len({volume.volume for volume in failed})
    share = num_failed / max(num_volumes, 1)
    if share > max_rejected:
        raise ValueError(
            f"rejected volumes must be at most {max_rejected:.2%}, got {share:.2%} "
            f"({len(failed)} volumes, such as '{failed[0].volume}': {failed[0].detail}). "
            f"They are listed in '{path}': fix them, or raise --max_rejected."
        )
    return num_failed


def log_embedded(output_dir: str | Path, num_volumes: int, num_failed: int) -> None:
    """Say on rank 0, as the last line of a run, what lies where and what does not.

    Args:
        output_dir: folder of the embeddings.
        num_volumes: of the whole run.
        num_failed: of these that have no embedding.
    """
    if idist.get_rank() == 0:
        left_out = f"; {num_failed} rejected, listed in '{Path(output_dir) / REJECTED}'" if num_failed else ""
        embedded = num_volumes - num_failed
        logger.info("Done: embeddings of %d volumes in '%s'%s.", embedded, output_dir, left_out)


def report_doubts(folder: str | Path) -> None:
    """Say in one line how many embedded volumes are doubtful; call it after ``report_rejected``.

    Args:
        folder: of the embedding store, into which all ranks have written.
    """
    if idist.get_rank() > 0 or not stored_volumes(folder):
        return
    store = EmbeddingStore(folder)
    if doubts := store.doubts():
        volume, texts = next(iter(doubts.items()))
        logger.warning(
            "%d of %d embedded volumes are doubtful, such as '%s': %s. "
            "EmbeddingStore('%s').doubts() lists them.",
            *(len(doubts), len(store), volume, texts[0], folder),
        )


def _write(path: Path, rejected: Sequence[RejectedVolume]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(RejectedVolume._fields)
        table.writerows(rejected)
