"""Which CT volumes a run works on."""

import logging
from pathlib import Path

from common.data.embedding_store import stored_volumes

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii")


def ct_files(
    dataset_dir: str | Path, output_dir: str | Path, skip_list: str | Path | None = None
) -> list[dict[str, str]]:
    """List the NIfTI volumes under a folder that have no embedding in ``output_dir`` yet.

    Args:
        dataset_dir: a NIfTI file, or a folder searched with its sub-folders.
        output_dir: folder of embeddings; a volume that has one is done.
        skip_list: text file of volumes to leave out, one path or name a line; names alone are compared, as
            CT-RATE's ``no_chest_*.txt`` lists paths of its old layout. None leaves out nothing.

    Returns:
        One dictionary a volume, sorted by name: ``image`` (path) and ``volume`` (file name without suffix).

    Raises:
        FileNotFoundError: if there is no such file, folder or list, or no NIfTI volume in the folder.
        ValueError: if two files share a volume's name, for one embedding would overwrite the other.
    """
    root = Path(dataset_dir)
    if not root.exists():
        raise FileNotFoundError(
            f"dataset_dir must be a NIfTI file or a folder, got '{root}', which does not exist."
        )
    paths = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    by_volume: dict[str, Path] = {}
    for path in paths:
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None:
            continue
        volume = path.name.removesuffix(suffix)
        if volume in by_volume:
            raise ValueError(
                f"volume names must be unique, got '{by_volume[volume]}' and '{path}' for '{volume}'."
            )
        by_volume[volume] = path
    if not by_volume:
        raise FileNotFoundError(f"dataset_dir must hold .nii.gz or .nii volumes, got none in '{root}'.")
    skipped = set() if skip_list is None else listed_volumes(skip_list) & by_volume.keys()
    files = [
        {"image": str(p), "volume": name} for name, p in sorted(by_volume.items()) if name not in skipped
    ]
    done = stored_volumes(output_dir)
    todo = [item for item in files if item["volume"] not in done]
    logger.info(
        "%d volumes in '%s': %d left out by the skip list, %d embedded already.",
        *(len(by_volume), root, len(skipped), len(files) - len(todo)),
    )
    return todo


def listed_volumes(listing: str | Path) -> set[str]:
    """Read the volumes that a text file lists, such as CT-RATE's ``no_chest_*.txt``.

    Args:
        listing: one name or path a line; folders, of either system, and suffixes are left away.

    Returns:
        Volume names.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(listing).is_file():
        raise FileNotFoundError(f"skip_list must be a text file, got '{listing}', which does not exist.")
    lines = (line.strip() for line in Path(listing).read_text(encoding="utf-8-sig").splitlines())
    names = (line.replace("\\", "/").rsplit("/", 1)[-1] for line in lines if line)
    return {name.removesuffix(".gz").removesuffix(".nii") for name in names}
