"""A plain folder of token arrays, as others publish them: ``<volume>.npy``, one row a token."""

# N volumes, T tokens of a volume, D embedding

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.embeddings.part import DTYPES, IDENTITY_KEYS, check_finite, crc32

SUFFIX = ".npy"
UNKNOWN = "unknown"


class EmbeddingArrays:
    """Read ``<volume>.npy`` files of float16, float32 or float64 ``(T, D)``; nothing pickled is opened.

    Attributes:
        volumes: names, sorted.
        lengths: int64 ``(N,)``, tokens of each volume.
        identity: as of an ``EmbeddingStore``; arrays do not say what made them, so all but dim and dtype is
            "unknown", and the encoder what the caller names.

    Args:
        folder: of the files.
        encoder: name to give them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is damaged or pickled, or arrays differ in width or number type, are empty or
            not floating (T, D).
    """

    def __init__(self, folder: str | Path, encoder: str = UNKNOWN) -> None:
        self.folder = Path(folder)
        paths = sorted(self.folder.glob(f"*{SUFFIX}"))
        if not paths:
            raise FileNotFoundError(f"embeddings must be in '{self.folder}', got no <volume>.npy there.")
        arrays = {path.name.removesuffix(SUFFIX): _mapped(path) for path in paths}
        self.volumes = sorted(arrays)
        self._known = dict.fromkeys(self.volumes, False)  # and whether its values have been checked
        self.lengths = np.array([len(arrays[volume]) for volume in self.volumes])
        first = self.volumes[0]
        for volume, array in arrays.items():
            for what, value in (("dim", array.shape[1]), ("dtype", array.dtype)):
                own = arrays[first].shape[1] if what == "dim" else arrays[first].dtype
                if value != own:
                    raise ValueError(
                        f"{what} must be the same for all embeddings, got {own} for volume '{first}' and "
                        f"{value} for volume '{volume}'. Keep each encoder's in a folder of its own."
                    )
        self.identity = dict.fromkeys(IDENTITY_KEYS, UNKNOWN) | {
            "encoder": encoder,
            "dim": arrays[first].shape[1],
            "dtype": "float16" if arrays[first].dtype == np.float16 else "float32",
        }

    def view(self, volume: str) -> torch.Tensor:
        """Return the tokens of a volume where they lie in their file; see ``EmbeddingStore.view``.

        Args:
            volume: name.

        Shape:
            Output: ``(T, D)``; float64 is converted to float32, which is a copy.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if a value is NaN or Inf.
        """
        if volume not in self._known:
            raise KeyError(f"No array of volume '{volume}' in '{self.folder}'.")
        tokens = torch.from_numpy(_mapped(self.folder / f"{volume}{SUFFIX}"))
        tokens = tokens.to(DTYPES[self.identity["dtype"]])
        if not self._known[volume]:
            check_finite(tokens, "tokens", volume)
            self._known[volume] = True
        return tokens

    def checksums(self, volumes: Sequence[str]) -> list[int]:
        """Return the CRC32 of each volume's tokens, all of which are read.

        Args:
            volumes: names.

        Raises:
            KeyError: if there is no such volume.
            ValueError: if a value is NaN or Inf.
        """
        return [crc32(self.view(volume)) for volume in volumes]


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"embedding must be a whole .npy array, got '{path}' ({error}).") from error
    if array.ndim != 2 or array.dtype.kind != "f" or array.dtype.itemsize > 8 or 0 in array.shape:
        raise ValueError(
            f"embedding must be a floating array (T, D) with at least one token, got {array.dtype} "
            f"{array.shape} for volume '{path.name.removesuffix(SUFFIX)}'."
        )
    return array
