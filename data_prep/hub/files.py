"""Which files of the datasets on the Hugging Face hub to download."""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from data_prep.sources.rad_chestct import PREFIX

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DATASETS = ("ct-rate", "rexgroundingct", "rad-chestct")
REPOSITORIES = {"ct-rate": "ibrahimhamamci/CT-RATE", "rexgroundingct": "rajpurkarlab/ReXGroundingCT"}
"""RAD-ChestCT's authors share it through Zenodo; they have no dataset on the hub."""

CT_RATE_SPLITS = ("train", "valid")

MAX_FOLDERS = 100
"""Up to so many patients are listed one by one; for more, listing the whole split takes fewer requests."""


class RemoteFile(NamedTuple):
    """A file of a repository.

    Args:
        path: path in the repository; it comes from the hub and must not be trusted.
        num_bytes: size.
        digest: sha256 of a large file, git's sha1 of a small one.
    """

    path: str
    num_bytes: int
    digest: str


class Place(NamedTuple):
    """Where files of one kind lie in a repository.

    Args:
        folder: folder of the repository; empty for its root.
        names: pattern of their file names.
        recursive: whether to look into sub-folders.
    """

    folder: str
    names: str
    recursive: bool = True


def table_places(dataset: str) -> list[Place]:
    """Return where the metadata, labels and lists of a dataset lie; they are small and always needed."""
    if dataset == "ct-rate":
        return [Place("dataset/metadata", "*"), Place("dataset/multi_abnormality_labels", "*")]
    if dataset == "rexgroundingct":
        return [Place("", "*.json", recursive=False)]
    return [Place("", "*.csv")]


def volume_places(
    dataset: str, split: str | None, form: str = "v2", patients: Sequence[range] = ()
) -> list[Place]:
    """Return where the volumes of a dataset lie, or the masks of ReXGroundingCT.

    Args:
        dataset: one of ``DATASETS``.
        split: one of the dataset's; None for all.
        form: form of CT-RATE: ``v2`` or ``v1``.
        patients: wanted patients; empty for all.

    Raises:
        ValueError: if the dataset has no such split.
    """
    splits = {"ct-rate": CT_RATE_SPLITS, "rexgroundingct": (), "rad-chestct": tuple(PREFIX)}[dataset]
    if split is not None and split not in splits:
        rule = f"be one of {splits}" if splits else "not be given"
        raise ValueError(f"split must {rule} for {dataset}, got '{split}'.")
    wanted = splits if split is None else (split,)
    if dataset == "rexgroundingct":
        return [Place("segmentations", "*.nii.gz")]
    if dataset == "rad-chestct":
        return [Place("", f"{PREFIX[name]}*.npz") for name in wanted]
    fixed = "_fixed" if form == "v2" else ""
    return [place for name in wanted for place in _patient_places(f"dataset/{name}{fixed}", name, patients)]


def label_map_places(split: str | None, patients: Sequence[range] = ()) -> list[Place]:
    """Return where CT-RATE's own TotalSegmentator label maps lie; the arguments as for ``volume_places``."""
    wanted = CT_RATE_SPLITS if split is None else (split,)
    root = "dataset/ts_seg/ts_total"
    return [place for name in wanted for place in _patient_places(f"{root}/{name}_fixed", name, patients)]


def _patient_places(folder: str, split: str, patients: Sequence[range]) -> list[Place]:
    if not patients or sum(map(len, patients)) > MAX_FOLDERS:
        return [Place(folder, "*.nii.gz")]
    return [Place(f"{folder}/{split}_{number}", "*.nii.gz") for span in patients for number in span]


def parse_patients(text: str) -> list[range]:
    """Read numbers and ranges, including both ends.

    Example:
        >>> parse_patients("1:100,205")
        [range(1, 101), range(205, 206)]
    """
    spans = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"patients must be numbers and ranges such as 1:100,205, got '{text}'.")
        spans.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return spans


def list_files(api: "HfApi", repo_id: str, commit: str, places: Iterable[Place]) -> list[RemoteFile]:
    """List files of a repository, each once, in the order of the hub.

    Args:
        api: the hub.
        repo_id: owner and name of the dataset.
        commit: commit of the repository.
        places: where to look; a patient's folder may be missing.
    """
    found = {file.path: file for place in places for file in _listed(api, repo_id, commit, place)}
    return list(found.values())


def _listed(api: "HfApi", repo_id: str, commit: str, place: Place) -> Iterator[RemoteFile]:
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import EntryNotFoundError

    try:
        for entry in api.list_repo_tree(
            repo_id, place.folder or None, recursive=place.recursive, revision=commit, repo_type="dataset"
        ):
            if isinstance(entry, RepoFile) and fnmatchcase(PurePosixPath(entry.path).name, place.names):
                digest = entry.blob_id if entry.lfs is None else entry.lfs.sha256
                yield RemoteFile(entry.path, entry.size, digest)
    except EntryNotFoundError:
        return


def select(
    files: Iterable[RemoteFile],
    patients: Sequence[range] = (),
    patterns: Sequence[str] = (),
    limit: int | None = None,
) -> list[RemoteFile]:
    """Choose volumes by patient and by name.

    Args:
        files: volumes.
        patients: wanted patients, by the first number in a file's name; empty for all.
        patterns: patterns of names without suffix, such as ``train_1_*``, of which one must match; empty for
            all.
        limit: number to choose at most, of the lowest patients; None for all.

    Returns:
        The chosen volumes, by patient and name.
    """
    chosen = [
        file
        for file in files
        if (not patients or any(patient_of(file) in span for span in patients))
        and (not patterns or any(fnmatchcase(stem_of(file), pattern) for pattern in patterns))
    ]
    return sorted(chosen, key=lambda file: (patient_of(file), file.path))[:limit]


def patient_of(file: RemoteFile) -> int:
    """Return the first number in a file's name, -1 without one.

    Example:
        >>> patient_of(RemoteFile("dataset/train_fixed/train_12/train_12_a/train_12_a_1.nii.gz", 1, ""))
        12
    """
    match = re.search(r"\d+", stem_of(file))
    return -1 if match is None else int(match[0])


def stem_of(file: RemoteFile) -> str:
    """Return the name of the volume a file holds."""
    return PurePosixPath(file.path).name.split(".")[0]
