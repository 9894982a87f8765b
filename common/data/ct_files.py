"""Which CT volumes a run works on."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii")


def ct_files(dataset_dir: str | Path, output_dir: str | Path) -> list[dict[str, str]]:
    """List the NIfTI volumes under a folder that have no embedding in ``output_dir`` yet.

    Args:
        dataset_dir: a NIfTI file, or a folder searched with its sub-folders.
        output_dir: folder of ``<volume>.safetensors`` embeddings; a volume that has one is done.

    Returns:
        One dictionary a volume, sorted by name: ``image`` (path) and ``volume`` (file name without suffix).

    Raises:
        FileNotFoundError: if there is no such file or folder, or no NIfTI volume in it.
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
    files = [{"image": str(path), "volume": volume} for volume, path in sorted(by_volume.items())]
    todo = [item for item in files if not (Path(output_dir) / f"{item['volume']}.safetensors").is_file()]
    logger.info("%d volumes in '%s', %d of them embedded already.", len(files), root, len(files) - len(todo))
    return todo
