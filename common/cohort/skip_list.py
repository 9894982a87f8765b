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
        ValueError: if it is no text in UTF-8.
    """
    if not Path(listing).is_file():
        raise FileNotFoundError(f"skip_list must be a text file, got '{listing}', which does not exist.")
    try:
        text = Path(listing).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"skip_list must be text in UTF-8, got '{listing}' ({error}).") from error
    lines = (line.strip() for line in text.splitlines())
    names = (line.replace("\\", "/").rsplit("/", 1)[-1] for line in lines if line)
    return {name.removesuffix(".gz").removesuffix(".nii").removesuffix(".npz") for name in names}
