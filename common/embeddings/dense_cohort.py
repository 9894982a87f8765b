"""Tokens of a cohort and what each of them shows, in bounded memory; and the rows that training draws."""

# N rows of a kind of token: slices (CLS) or patches of all volumes; P patches of a slice, D embedding,
# K kinds of token, B rows of a batch, C classes

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from isal import isal_zlib
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix, vstack
from torch.utils.data import Dataset, Sampler

from common.cohort.cohort import natural_order, patient_of
from common.embeddings.dense_labels import TASKS, findings_present, read_dense_labels
from common.embeddings.store import EmbeddingStore

TOKEN_KINDS = ("cls", "patch")

SLICES_PER_CHUNK = 64
"""Slices whose patch tokens are read at a time; bounds memory, changes no number."""

ROWS_PER_CHUNK = 65536
"""Rows whose labels are made dense at a time; bounds memory, changes no number."""


def tasks() -> dict[str, int]:
    """Return the classes of each task in the order of the columns of labels and logits, for a config."""
    return dict(TASKS)


def labelled_and_embedded(embeddings_dir: str | Path, labels_dir: str | Path) -> list[str]:
    """List the volumes with dense labels, all of which must be embedded with their patch tokens.

    Raises:
        FileNotFoundError: if a folder holds nothing, or a labelled volume has no embedding.
        ValueError: if no patch tokens are stored.
    """
    store = EmbeddingStore(embeddings_dir)
    if "patches" not in store.fields:
        raise ValueError(
            f"No patch tokens in '{embeddings_dir}'. Embed with --patch_tokens True into another folder."
        )
    labelled = sorted((path.stem for path in Path(labels_dir).glob("*.safetensors")), key=natural_order)
    if not labelled:
        raise FileNotFoundError(
            f"No dense labels in '{labels_dir}'. Make them with python -m data_prep dense-labels."
        )
    absent = [volume for volume in labelled if volume not in set(store.volumes)]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of {len(labelled)} labelled volumes have no embedding in '{embeddings_dir}', the "
            f"first is '{absent[0]}'. Embed them, or remove their labels."
        )
    return labelled


class DenseCohort:
    """Gives tokens and labels of every slice and patch of some volumes; labels in memory, tokens on disk.

    Rows are counted over volumes, slices from the feet and patches row-major: CLS row s is slice s of all,
    and patch row s * P + p its patch p. Columns are the classes of ``TASKS``, one task after the other.

    Attributes:
        patients: patients of the volumes, in natural order.
        num_rows: kind of token to N.

    Args:
        embeddings_dir: embeddings from an encoder bundle, with patch tokens.
        labels_dir: labels from ``python -m data_prep dense-labels``.
        volumes: names of the volumes.

    Raises:
        FileNotFoundError: if a volume has no labels.
        KeyError: if a volume is not embedded.
        ValueError: if labels do not fit the tokens in number of slices or patches, or are of another crop.
    """

    def __init__(self, embeddings_dir: str | Path, labels_dir: str | Path, volumes: Sequence[str]) -> None:
        self.store = EmbeddingStore(embeddings_dir)
        self.identity = self.store.identity
        self.volumes = list(volumes)
        length_of = dict(zip(self.store.volumes, self.store.lengths.tolist(), strict=True))
        of_patches, of_slices = [], []
        for volume in self.volumes:
            labels = read_dense_labels(Path(labels_dir) / f"{volume}.safetensors")
            metadata = self.store.read(volume).metadata
            grid = metadata["patch_grid"]
            shape = (length_of[volume], grid[0] * grid[1])
            if labels.findings.shape != shape or grid[0] != grid[1]:
                raise ValueError(
                    f"'{volume}' has (slices, patches) = {shape} embedded and {labels.findings.shape} "
                    f"labelled. Label with --grid {grid[0]}, into another --out; grids must be square."
                )
            # without a box the images are whole slices
            box = tuple(metadata.get("box") or (0, 0, metadata["side_px"]))
            if box != labels.box:
                raise ValueError(
                    f"'{volume}' was embedded in the box {box} and labelled in {labels.box}. Label and embed "
                    "the same files, with a cropped preprocessing."
                )
            order = patch_order(shape, metadata.get("slice_axes", "yx"))
            of_patches.append((labels.findings.ravel()[order], labels.shares[order]))
            shares, findings = labels.of_slices()
            of_slices.append((findings, csr_matrix(shares)))
        self.patches_of_slice = shape[1]
        self._findings: dict[str, NDArray[np.uint16]] = {}
        self._shares: dict[str, csr_matrix] = {}
        for kind, parts in zip(TOKEN_KINDS, (of_slices, of_patches), strict=True):
            self._findings[kind] = np.concatenate([findings for findings, _ in parts])
            self._shares[kind] = vstack([shares for _, shares in parts], format="csr")
        self._by_class: dict[str, csc_matrix] = {}
        self.num_rows = {kind: len(findings) for kind, findings in self._findings.items()}
        self.patients = sorted({patient_of(volume) for volume in self.volumes}, key=natural_order)
        self._lengths = [length_of[volume] for volume in self.volumes]

    def checksum(self) -> str:
        """Return eight hexadecimal digits that tell these volumes, labels and embeddings from others."""
        total = isal_zlib.crc32(json.dumps([self.volumes, self.store.checksums(self.volumes)]).encode())
        for kind in TOKEN_KINDS:
            shares = self._shares[kind]
            for array in (self._findings[kind], shares.data, shares.indices, shares.indptr):
                total = isal_zlib.crc32(array.tobytes(), total)
        return f"{total:08x}"

    def patient_of_row(self, kind: str) -> NDArray[np.int64]:
        """Return the place in ``patients`` of each row ``(N,)``."""
        per_slice = self.patches_of_slice if kind == "patch" else 1
        places = [self.patients.index(patient_of(volume)) for volume in self.volumes]
        return np.repeat(places, np.array(self._lengths) * per_slice)

    def soft_targets(self, kind: str, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return what probes learn: presence of findings and shares of organs, ``(len(rows), C)``."""
        soft = np.empty((len(rows), sum(TASKS.values())), np.float16)
        for first in range(0, len(rows), ROWS_PER_CHUNK):
            chunk = rows[first : first + ROWS_PER_CHUNK]
            present = findings_present(self._findings[kind][chunk])
            soft[first : first + len(chunk), : present.shape[1]] = present
            soft[first : first + len(chunk), present.shape[1] :] = self._shares[kind][chunk].toarray()
        return soft

    def targets(self, kind: str, column: int) -> NDArray[np.bool_]:
        """Return what probes are scored on: whether each row shows anything of a class, ``(N,)``."""
        if column < TASKS["rexgroundingct"]:
            bits: NDArray[np.uint16] = self._findings[kind]
            return (bits >> np.uint16(column) & 1).astype(bool)
        if kind not in self._by_class:
            self._by_class[kind] = self._shares[kind].tocsc()
        by_class, organ = self._by_class[kind], column - TASKS["rexgroundingct"]
        target = np.zeros(self.num_rows[kind], bool)
        stored = slice(by_class.indptr[organ], by_class.indptr[organ + 1])
        target[by_class.indices[stored]] = by_class.data[stored] > 0
        return target

    def tokens(self, kind: str) -> Iterator[torch.Tensor]:
        """Yield the tokens of all rows in order, in chunks ``(n, D)``; patch tokens are read as they come."""
        for volume, length in zip(self.volumes, self._lengths, strict=True):
            if kind == "cls":
                yield self.store.read(volume).tokens
                continue
            for first in range(0, length, SLICES_PER_CHUNK):
                slices = range(first, min(first + SLICES_PER_CHUNK, length))
                yield self.store.read_patches(volume, slices).flatten(0, 1)

    def read_rows(self, kind: str, rows: NDArray[np.int64]) -> torch.Tensor:
        """Read the tokens of ascending rows as float16 ``(len(rows), D)``, in one pass over the disk."""
        taken = torch.empty(len(rows), self.identity["dim"], dtype=torch.float16)
        first = done = 0
        for chunk in self.tokens(kind):
            stop = int(np.searchsorted(rows, first + len(chunk)))
            if stop > done:
                taken[done:stop] = chunk[torch.from_numpy(rows[done:stop] - first)].half()
            first, done = first + len(chunk), stop
        return taken


def patch_order(shape: tuple[int, int], slice_axes: str) -> NDArray[np.int64]:
    """Return the row of labels for each patch token."""
    rows = np.arange(shape[0] * shape[1])
    if slice_axes == "yx":
        return rows
    grid = round(shape[1] ** 0.5)
    return rows.reshape(shape[0], grid, grid).transpose(0, 2, 1).ravel()


class RowBatch(TypedDict):
    """Rows of each of ``TOKEN_KINDS`` and what they show, float16."""

    tokens: torch.Tensor  # (K, B, D)
    targets: torch.Tensor  # (K, B, C)


class DrawnRows(Dataset[RowBatch]):
    """The batches of a training run: rows are drawn before any token is read, and only those are kept.

    Row b of step t is drawn with replacement from all rows, by the seed alone. Of CT-RATE's patch tokens the
    paper's 15,000 steps of 256 draw 17 %: 7.9 GB in 16 bits rather than 44.

    Attributes:
        tokens: for each kind of token, the different rows in memory.

    Raises:
        ValueError: if there is no step or no row.
    """

    def __init__(self, cohort: DenseCohort, num_steps: int, batch_size: int, seed: int) -> None:
        if num_steps < 1 or batch_size < 1:
            raise ValueError(
                f"num_steps and batch_size must be at least 1, got {num_steps} and {batch_size}."
            )
        self.cohort, self.num_steps, self.batch_size = cohort, num_steps, batch_size
        self.tokens, self._targets, self._places = [], [], []
        for number, kind in enumerate(TOKEN_KINDS):
            draws = np.random.default_rng([seed, number]).integers(
                0, cohort.num_rows[kind], (num_steps, batch_size)
            )
            drawn, places = np.unique(draws, return_inverse=True)
            self.tokens.append(cohort.read_rows(kind, drawn))
            self._targets.append(torch.from_numpy(cohort.soft_targets(kind, drawn)))
            self._places.append(torch.from_numpy(places.reshape(draws.shape).astype(np.int32)))

    def prevalence(self) -> NDArray[np.float64]:
        """Return the mean of the targets of the drawn rows ``(K, C)``."""
        counts = [torch.bincount(places.flatten()).double() for places in self._places]
        sums = (count @ rows.double() for count, rows in zip(counts, self._targets, strict=True))
        return torch.stack(list(sums)).numpy() / (self.num_steps * self.batch_size)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> RowBatch:
        """Return the batch of a step, counted from 0."""
        places = [of_kind[step].long() for of_kind in self._places]
        return {
            "tokens": torch.stack([part[place] for part, place in zip(self.tokens, places, strict=True)]),
            "targets": torch.stack([part[place] for part, place in zip(self._targets, places, strict=True)]),
        }


class RemainingSteps(Sampler[int]):
    """The steps from ``start_step`` to ``num_steps``."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.start_step = num_steps, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start_step, self.num_steps))
