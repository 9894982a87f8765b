"""Lists of volumes that a run leaves out."""

from pathlib import Path


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
