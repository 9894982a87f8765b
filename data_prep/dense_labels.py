"""Dense labels of a cohort: which organs and findings every patch shows, through the crop of its image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.ct.rejection import RejectedError, RejectedVolume
from data_prep.cluster import ShowProgress, run_tasks
from data_prep.sources.rexgroundingct import read_full_findings
from data_prep.sources.source_volume import SourceVolume, read_ct
from data_prep.sources.totalsegmentator import read_full_label_map

if TYPE_CHECKING:
    from distributed import Client

    from common.embeddings.dense_labels import DenseLabels


class Task(NamedTuple):
    """A volume to label: its CT and masks, patches along a side, folder of the label files."""

    source: SourceVolume
    grid: int
    out: Path


def dense_labels_of(source: SourceVolume, grid: int) -> DenseLabels:
    """Count what the patches of a volume show, through the body crop that its image takes.

    Args:
        source: CT and masks; a volume without an annotation has no findings.
        grid: patches along a side of the cropped image.

    Raises:
        RejectedError: if anything is wrong with the CT or a mask.
    """
    import torch  # takes seconds to import; --help must not wait for it

    from common.embeddings.dense_labels import TASKS, DenseLabels
    from common.transforms.dense_labels import patch_bits, patch_shares
    from common.transforms.slice_strategies import body_box, pad_to_square

    if source.ts is None:
        raise RejectedError("mask", f"'{source.volume}' must have a TotalSegmentator label map, got none")
    ct = read_ct(source)
    ids = read_full_label_map(source.ts, ct.grid)
    bits = np.zeros(ids.shape, np.uint16) if source.rex is None else read_full_findings(source.rex, ct.grid)
    box = body_box(torch.from_numpy(pad_to_square(ct.hu, int(ct.hu.min()))))
    return DenseLabels(
        source.volume,
        box,
        patch_shares(pad_to_square(ids, 0), box, grid, TASKS["totalsegmentator"]),
        patch_bits(pad_to_square(bits, 0), box, grid),
    )


def write_labels_of(task: Task) -> None:
    """Write the labels of one volume; see ``dense_labels_of``."""
    from common.embeddings.dense_labels import write_dense_labels

    write_dense_labels(task.out, dense_labels_of(task.source, task.grid))


def _is_labelled(out: Path, volume: str, grid: int) -> bool:
    """Tell whether a volume has labels of a grid; labels of another grid are refused."""
    from common.embeddings.dense_labels import read_dense_labels

    path = out / f"{volume}.safetensors"
    if not path.is_file():
        return False
    patches = read_dense_labels(path).findings.shape[1]
    if patches != grid**2:
        raise ValueError(
            f"Labels of '{volume}' in '{out}' have {patches} patches per slice, but --grid {grid} makes "
            f"{grid**2}. Choose another --out, or the old grid."
        )
    return True


def write_all(
    client: Client,
    sources: Sequence[SourceVolume],
    out: Path,
    *,
    grid: int,
    progress: ShowProgress,
) -> list[RejectedVolume]:
    """Write the labels of volumes that have none yet of this grid, on a cluster.

    Args:
        client: Dask cluster.
        sources: volumes with masks.
        out: folder of the label files.
        grid: patches along a side of the cropped image.
        progress: called after every volume.

    Returns:
        Volumes that were left out, with the reason.

    Raises:
        ValueError: if existing labels are damaged or of another grid.
    """
    todo = [
        Task(source.absolute(), grid, out) for source in sources if not _is_labelled(out, source.volume, grid)
    ]
    rejected, done = [], len(sources) - len(todo)
    for task, result in run_tasks(client, write_labels_of, todo):
        done += 1
        if isinstance(result, RejectedError):
            rejected.append(result.of(task.source.volume))
        elif isinstance(result, BaseException):
            raise result
        progress("Labelling patches", done, len(sources))
    return rejected
