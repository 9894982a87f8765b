"""Any folder of chest CTs in HU, one file each, with TotalSegmentator label maps where there are some."""

from pathlib import Path

from common.ct.files import find_cts
from common.ct.rejection import RejectedVolume
from data_prep.source_volume import SourceVolume, with_masks


def find_volumes(
    folder: Path, split: str, masks: Path | None = None
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the volumes of a folder and its sub-folders; DICOM is left to ``dicom``.

    Args:
        folder: of volumes in HU with right headers, a file each, see :func:`common.ct.files.find_cts`; or one
            file, or zip.
        split: to write them as.
        masks: folder of TotalSegmentator label maps with the volumes' names, which may lie in ``folder``.

    Returns:
        The volumes, and what was left out.

    Raises:
        FileNotFoundError: if the folder is not there or has no volume, or ``masks`` none of theirs.
    """
    if not folder.exists():
        raise FileNotFoundError(f"folder must be a folder of volumes, got '{folder}', which does not exist.")
    cts, rejected = find_cts(folder, look=None, leave_out=masks)
    if not cts and not rejected:
        raise FileNotFoundError(
            f"folder must hold volumes in NIfTI, MetaImage, NRRD or npz, got none in '{folder}'. "
            "DICOM is read by the command dicom."
        )
    sources = [SourceVolume.of(ct, split, folder) for ct in cts]
    if masks is None:
        return sources, rejected
    joined, without = with_masks(sources, masks, "masks")
    return joined, rejected + without
