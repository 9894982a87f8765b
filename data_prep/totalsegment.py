"""Runs TotalSegmentator over a folder of CTs: one label map per volume, on the volume's own grid.

Shapes: X Y Z voxel axes as stored.
"""

import contextlib
import gzip
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from common.ct.files import open_volume
from common.ct.geometry import CT, Grid, axial_slices
from common.ct.rejection import RejectedError, RejectedVolume
from common.run.process import atomic_file
from common.shards.codec import NUM_TS_CLASSES
from data_prep.cluster import ShowProgress
from data_prep.sources.folders import find_volumes
from data_prep.sources.rad_chestct import PREFIX, find_rad_chestct, npz_files
from data_prep.sources.source_volume import SourceVolume, planned_slices, read_ct, read_grid

AFFINE_TOLERANCE_MM = 1e-3
"""NIfTI headers hold an affine in single precision."""


class Outcome(NamedTuple):
    """The outcome of a run: label maps written, label maps that existed, volumes without one and why."""

    num_segmented: int
    num_kept: int
    rejected: list[RejectedVolume]


def find_cts(folder: Path) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the CTs of a folder and its sub-folders, one file each: in HU, or of RAD-ChestCT.

    Returns:
        The volumes by name, and those that names alone are enough to reject.

    Raises:
        FileNotFoundError: if there is none.
    """
    found, rejected = find_volumes(folder, "")
    splits = {split: npz_files(folder, prefix) for split, prefix in PREFIX.items()}
    of_rad = {path.absolute() for npz in splits.values() for paths in npz.values() for path in paths}
    sources = [source for source in found if source.ct.path not in of_rad]
    for split in (split for split, npz in splits.items() if npz):
        of_split, failed = find_rad_chestct(folder, split)  # knows the spacing from a table
        sources += of_split
        rejected = [item for item in rejected if item not in failed] + failed
    return sorted(sources, key=lambda source: source.volume), rejected


def part_of(sources: Sequence[SourceVolume], part: str) -> list[SourceVolume]:
    """Return every n-th volume, for n processes that share a folder.

    Args:
        sources: volumes.
        part: such as ``1/4`` for the first of four parts.

    Raises:
        ValueError: if there is no such part.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"part must be a part such as 1/4, got '{part}'.")
    return list(sources[int(match[1]) - 1 :: int(match[2])])


def segment_all(
    sources: Sequence[SourceVolume], out: Path, *, device: str, fast: bool, progress: ShowProgress
) -> Outcome:
    """Write the label maps of volumes that have none; call it inside ``totalsegmentator_ready``.

    Args:
        sources: volumes.
        out: folder of the label maps; those that exist and lie on their CT's grid are kept.
        device: ``gpu``, ``gpu:1`` or ``cpu``.
        fast: whether to use the 3 mm model.
        progress: called after each volume.

    Returns:
        The outcome. A volume that fails does not stop the others.

    Raises:
        OSError: if a label map cannot be written.
    """
    num_segmented = num_kept = 0
    rejected = []
    for source in sources:
        try:
            planned_slices(source)
            if has_label_map(source, out):
                num_kept += 1
            else:
                content = segment(source, device, fast)
                with atomic_file(label_map_path(source, out)) as file:
                    file.write(content)
                num_segmented += 1
        except RejectedError as error:
            rejected.append(error.of(source.volume))
        progress("segmented", num_segmented + num_kept + len(rejected), len(sources))
    return Outcome(num_segmented, num_kept, rejected)


def label_map_path(source: SourceVolume, out: Path) -> Path:
    """Return where the label map of a volume lies."""
    return out / f"{source.volume}.nii.gz"


def has_label_map(source: SourceVolume, out: Path) -> bool:
    """Tell by its header whether a volume has a label map: an existing file is complete.

    Raises:
        RejectedError: if the CT cannot be read.
    """
    path = label_map_path(source, out)
    if not path.is_file():
        return False
    try:
        with open_volume(path) as file:
            header = file.header
    except RejectedError:
        return False
    return _is_on(header.shape, header.affine, read_grid(source))


def segment(source: SourceVolume, device: str, fast: bool) -> bytes:
    """Read a CT and run TotalSegmentator's task ``total`` on it.

    Args:
        source: the volume.
        device: ``gpu``, ``gpu:1`` or ``cpu``.
        fast: whether to use the 3 mm model.

    Returns:
        Gzipped NIfTI file of the label map: uint8 ids ``(X, Y, Z)`` on the CT's grid, with the names of the
        classes in its header.

    Raises:
        RejectedError: if the CT is damaged or not in HU, TotalSegmentator fails, or its result does not fit.
    """
    from totalsegmentator import python_api

    ct = read_ct(source)
    image = nib.nifti1.Nifti1Image(stored_order(ct), ct.grid.affine)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints in spite of quiet
            result = python_api.totalsegmentator(
                image, None, ml=True, task="total", fast=fast, device=device, quiet=True
            )
    except Exception as error:  # noqa: BLE001 (torch, nnU-Net and nibabel raise what they like)
        said = " ".join(str(error).split())
        raise RejectedError("totalsegmentator", f"{type(error).__name__}: {said}") from error
    ids = checked_ids(np.asanyarray(result.dataobj), result.affine, ct.grid)
    header = result.header.copy()
    header.set_data_dtype(np.uint8)
    label_map = nib.nifti1.Nifti1Image(ids, ct.grid.affine, header)
    return gzip.compress(label_map.to_bytes(), mtime=0)


def stored_order(ct: CT) -> np.ndarray:
    """Return the HU of a CT in the order of the file: int16 ``(X, Y, Z)``."""
    stored = np.empty(ct.grid.shape, np.int16, order="F")
    slices, _ = axial_slices(stored, ct.grid.affine)  # another view of the same memory
    slices[...] = ct.hu
    return stored


def checked_ids(ids: np.ndarray, affine: np.ndarray, ct: Grid) -> np.ndarray:
    """Return the ids of a label map as uint8 if they can belong to a CT.

    Args:
        ids: ids from TotalSegmentator, ``(X, Y, Z)``.
        affine: ``(4, 4)`` of the label map.
        ct: grid of the CT.

    Raises:
        RejectedError: if the grid is not the CT's, an id is unknown, or no organ was found.
    """
    if not _is_on(ids.shape, affine, ct):
        raise RejectedError(
            "mask", f"label map must lie on the CT's grid of shape {ct.shape}, got {ids.shape}"
        )
    low, high = ids.min(), ids.max()
    if not (low >= 0 and high < NUM_TS_CLASSES):
        raise RejectedError("mask", f"ids must lie in 0..{NUM_TS_CLASSES - 1}, got {low:g} to {high:g}")
    if high == 0:
        raise RejectedError("mask", "No organ in the label map: is this a chest CT in HU?")
    return ids.astype(np.uint8)


def _is_on(shape: tuple[int, ...], affine: np.ndarray, ct: Grid) -> bool:
    return tuple(shape) == ct.shape and np.allclose(affine, ct.affine, rtol=0, atol=AFFINE_TOLERANCE_MM)


@contextlib.contextmanager
def totalsegmentator_ready(device: str, fast: bool) -> Iterator[None]:
    """Prepare TotalSegmentator and keep it from reporting its use.

    It reports each run unless its configuration says otherwise, and counts runs in that file. This process
    gets a configuration of its own, so parallel ones do not write to one file. Missing weights are downloaded
    to the place where TotalSegmentator looks for them.

    Args:
        device: ``gpu``, ``gpu:1`` or ``cpu``.
        fast: whether the 3 mm model is wanted.

    Raises:
        ValueError: if there is no such device.
        ConnectionError: if weights are missing and cannot be downloaded.
    """
    from totalsegmentator import config, python_api

    python_api.validate_device_type_api(device)
    with contextlib.redirect_stdout(io.StringIO()):
        selected = python_api.select_device(device)
    if device.startswith("gpu") and str(selected) == "cpu":
        raise ValueError(f"CUDA finds no device '{device}'. Try --device cpu.")
    weights = config.get_weights_dir()
    settings = {"totalseg_id": "", "send_usage_stats": False, "prediction_counter": 0}
    with tempfile.TemporaryDirectory(prefix="totalsegmentator_") as home:
        Path(home, "config.json").write_text(json.dumps(settings | {"statistics_disclaimer_shown": True}))
        with _environment(TOTALSEG_HOME_DIR=home, TOTALSEG_WEIGHTS_PATH=str(weights)):
            _ensure_weights(fast, weights)
            yield


def _ensure_weights(fast: bool, weights: Path) -> None:
    from totalsegmentator import python_api

    tasks = python_api.get_task_config("total", fast=fast, quiet=True)["task_id"]
    try:
        for task in tasks if isinstance(tasks, list) else [tasks]:
            python_api.download_pretrained_weights(task)
    except (OSError, zipfile.BadZipFile) as error:
        option = "total_fast" if fast else "total"
        raise ConnectionError(
            f"No weights of TotalSegmentator in '{weights}', and their download failed: "
            f"{' '.join(str(error).split())}. With network, run: totalseg_download_weights -t {option}; "
            "otherwise set TOTALSEG_WEIGHTS_PATH to a copy of that folder."
        ) from error


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
