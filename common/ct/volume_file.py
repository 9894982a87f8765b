"""Opens the file of a volume, CT or label map, whatever its format: one header, voxels plane by plane."""

from contextlib import AbstractContextManager
from pathlib import Path

from common.ct.itk import open_itk
from common.ct.names import ITK_SUFFIXES, suffix_of
from common.ct.nifti_file import VolumeFile, VolumeHeader, open_nifti


def open_volume(path: Path) -> AbstractContextManager[VolumeFile]:
    """Open a file for reading.

    Args:
        path: NIfTI (``.nii``, ``.nii.gz``, ``.hdr`` with ``.img``), MetaImage or NRRD, suffixes in any case.

    Raises:
        RejectedError: as ``open_nifti`` and ``open_itk``.
    """
    return open_itk(path) if suffix_of(path.name, ITK_SUFFIXES) else open_nifti(path)


def read_header(path: Path) -> VolumeHeader:
    """Read what a file says about its array, without the array; arguments and errors of ``open_volume``."""
    with open_volume(path) as file:
        return file.header
