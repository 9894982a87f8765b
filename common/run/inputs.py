"""A wrong path is told before anything is loaded or built."""

from pathlib import Path


def must_exist(**paths: str | Path | None) -> None:
    """Refuse inputs of a bundle that are not there.

    Args:
        paths: option to its file or folder; None for one that is not used.

    Raises:
        FileNotFoundError: if one does not exist.

    Example:
        >>> must_exist(dataset_dir=".", skip_list=None)
    """
    for option, path in paths.items():
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(
                f"Cannot find {option}: '{path}' does not exist. Pass another --{option}."
            )
