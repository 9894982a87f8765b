"""Reads MetaImage and NRRD files with SimpleITK.

Shapes: X Y Z voxel axes as stored.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.ct.geometry import check_size, is_blank, rejecting
from common.ct.nifti import CHUNK_BYTES, MAX_INFLATION, VolumeFile, VolumeHeader, without_trailing_ones
from common.ct.rejection import RejectedError

if TYPE_CHECKING:
    import SimpleITK as sitk

MAX_HEADER_BYTES = 2**16
KEY = re.compile(r"^([A-Za-z][\w ]*?)[ \t]*(?:=|:)[ \t]*(.*?)[ \t\r]*$", re.MULTILINE)
SPACES = "left-posterior-superior lps right-anterior-superior ras left-anterior-superior las".split()
"""Worlds of NRRD that say where the patient's left is, and that ITK turns into its own."""
ORIENTATIONS = {"transformmatrix", "rotation", "orientation"}
"""Keys of MetaImage; without one of them ITK supposes some orientation."""
DAMAGED = (OSError, ValueError, RuntimeError)
"""What reading a damaged file raises."""


@contextmanager
def open_itk(path: Path) -> Iterator[VolumeFile]:
    """Open a file for reading; its voxels are read as a whole.

    Args:
        path: ``.mha`` or ``.nrrd``; or ``.mhd`` or ``.nhdr``, whose voxels lie in one file beside it.

    Raises:
        RejectedError: now or while reading, if the file is truncated, damaged, or not of its format, or its
            voxels are no numbers or more than any CT has.
    """
    import SimpleITK as sitk  # takes 0.3 s to import; --help must not wait for it

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with rejecting(f"'{path.name}'", DAMAGED):
        is_nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
        with path.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES).decode("latin-1")
        if not is_nrrd:
            _check_axes(text)
        stated = _stated(text)
        files = [path, *_voxel_file(path, stated)]
        reader = sitk.ImageFileReader()
        reader.SetImageIO("NrrdImageIO" if is_nrrd else "MetaImageIO")
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1:
            raise ValueError("its voxels are colors or vectors")
        header = _header(reader)
        check_size(header.shape)
        size = sum(file.stat().st_size for file in files)
        if math.prod(header.shape) > size * MAX_INFLATION:
            raise ValueError(f"{size} bytes for an array of shape {header.shape}")
        says_left = stated.get("space", "").lower() in SPACES if is_nrrd else ORIENTATIONS & stated.keys()
        if not says_left:
            header = header._replace(is_blank=True)
    yield VolumeFile(header, partial(_planes, path, reader), files)


def _check_axes(text: str) -> None:
    """Refuse a MetaImage of an odd number of axes: ITK would write outside its memory, which ends Python."""
    for said in re.findall("NDims(.*)", text.partition("ElementDataFile")[0]) or [""]:
        if not re.fullmatch(r"\s*[=:]\s*[1-9]\s*", said):
            raise ValueError(f"its NDims must be from 1 to 9, got {said.strip(' =:')!r}")


def _stated(text: str) -> dict[str, str]:
    """Return what the text of a header states, by the keys in lower case."""
    stated: dict[str, str] = {}
    for key, value in KEY.findall(re.split(r"\n\r?\n", text)[0]):
        stated[key.lower()] = value
        if key.lower() == "elementdatafile":
            break
    return stated


def _voxel_file(path: Path, stated: dict[str, str]) -> list[Path]:
    """Return the file with the voxels, if it is another; a header may name none but one beside it."""
    name = stated.get("elementdatafile") or stated.get("data file") or stated.get("datafile") or "LOCAL"
    if name.upper() == "LOCAL":
        return []
    beside = path.parent / name
    if Path(name).name != name or "\\" in name or not beside.is_file():
        raise ValueError(f"its voxels must lie in one file beside it, got {name!r}")
    return [beside]


def _header(reader: "sitk.ImageFileReader") -> VolumeHeader:
    shape = tuple(reader.GetSize())
    if len(shape) < 3:
        raise RejectedError("geometry", f"volume must have 3 axes, got shape {shape}")
    if min(shape) < 1:
        raise ValueError(f"an array of shape {shape}")
    affine = np.eye(4)
    direction = np.array(reader.GetDirection()).reshape(len(shape), len(shape))
    affine[:3, :3] = direction[:3, :3] * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    affine[:2] *= -1  # from LPS to RAS
    shape = without_trailing_ones(shape)
    return VolumeHeader(shape, affine, is_blank=is_blank(shape, affine))


def _planes(path: Path, reader: "sitk.ImageFileReader") -> Iterator[tuple[int, np.ndarray]]:
    import SimpleITK as sitk

    with rejecting(f"'{path.name}'", DAMAGED):
        image = reader.Execute()
        voxels = sitk.GetArrayViewFromImage(image)
        if voxels.dtype.kind not in "iuf":
            raise ValueError(f"its voxels are {voxels.dtype}, no numbers")
    stored = voxels.T.squeeze(tuple(range(3, voxels.ndim)))
    at_once = max(1, CHUNK_BYTES // stored[..., 0].nbytes)
    for start in range(0, stored.shape[-1], at_once):
        yield start, stored[..., start : start + at_once]
