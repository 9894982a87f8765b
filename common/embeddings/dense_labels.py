"""Files of dense labels: what every patch of a volume shows, beside the patch embeddings they belong to."""

# S slices, P = G * G patches of a slice in row-major order, C classes

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.sparse import csr_matrix

from common.cohort.cohort import load_labels
from common.run.process import atomic_file
from common.transforms.dense_labels import slice_shares

TENSORS = ("share", "class", "row_end", "findings")

TASKS = {name: len(load_labels(name)) for name in ("rexgroundingct", "totalsegmentator")}
"""Number of classes of each label set, in the order of the columns of a cohort's labels."""


class DenseLabels(NamedTuple):
    """Labels of one volume, seen through the body crop of its image."""

    volume: str
    box: tuple[int, int, int]  # top, left and side in pixels of the square crop, in slices padded to squares
    shares: csr_matrix  # TotalSegmentator, float32 (S * P, 118): share of each patch, with background
    findings: NDArray[np.uint16]  # ReXGroundingCT, (S, P): bit k for the k-th code

    def of_slices(self) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
        """Return what whole slices show: shares ``(S, 118)`` and findings ``(S,)``."""
        findings: NDArray[np.uint16] = np.bitwise_or.reduce(self.findings, axis=1)
        return slice_shares(self.shares, self.findings.shape[1]), findings


def findings_present(bits: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Unpack findings ``(...)`` to one column per code of ReXGroundingCT, ``(..., 14)``.

    Example:
        >>> findings_present(np.array([0, 5], np.uint16))[:, :3].tolist()
        [[False, False, False], [True, False, True]]
    """
    codes = np.arange(TASKS["rexgroundingct"], dtype=np.uint16)
    return (bits[..., None] >> codes & 1).astype(bool)


def write_dense_labels(folder: str | Path, labels: DenseLabels) -> None:
    """Write ``<volume>.safetensors``; the file appears only when it is whole, and its folder when missing.

    Raises:
        ValueError: if shares and findings are not of the same patches, or classes are missing.
    """
    path = Path(folder) / f"{labels.volume}.safetensors"
    num_slices, patches = labels.findings.shape
    expected = (num_slices * patches, TASKS["totalsegmentator"])
    if labels.shares.shape != expected:
        raise ValueError(
            f"shares must have shape {expected} to fit the findings, got {labels.shares.shape} "
            f"for volume '{labels.volume}'."
        )
    tensors = {
        "share": labels.shares.data.astype(np.float32),
        "class": labels.shares.indices.astype(np.uint8),
        "row_end": labels.shares.indptr[1:].astype(np.int32),
        "findings": labels.findings,
    }
    metadata = {"volume": labels.volume, "box": json.dumps(labels.box)}
    metadata["crc32"] = str(_crc32(tensors, metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(save(tensors, metadata=metadata))


def _crc32(tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> int:
    """Checksum of all that a file holds."""
    value = isal_zlib.crc32(f"{metadata['volume']} {metadata['box']}".encode())
    for name in TENSORS:
        value = isal_zlib.crc32(np.ascontiguousarray(tensors[name]).data.cast("B"), value)
    return int(value)


def read_dense_labels(path: str | Path) -> DenseLabels:
    """Read a file of :func:`write_dense_labels`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No dense labels '{path}'. Make them with python -m data_prep dense-labels.")
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in TENSORS}
            metadata = file.metadata() or {}
        if metadata.get("crc32") != str(_crc32(tensors, metadata)):
            raise ValueError("its checksum differs")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"Cannot read '{path}' ({error}). Delete it and make it again with python -m data_prep "
            "dense-labels."
        ) from error
    share, classes, row_end, findings = tensors.values()
    indptr = np.concatenate([[0], row_end]).astype(np.int32)
    shape = (findings.size, TASKS["totalsegmentator"])
    shares = csr_matrix((share, classes.astype(np.int32), indptr), shape=shape)
    top, left, side = json.loads(metadata["box"])
    return DenseLabels(metadata["volume"], (top, left, side), shares, findings)
