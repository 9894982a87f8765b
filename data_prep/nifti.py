"""Any folder of NIfTI chest CTs in HU, with TotalSegmentator label maps where there are some."""

from pathlib import Path

from common.ct.nifti_file import find_nifti, only_file
from common.ct.rejection import RejectedError, RejectedVolume
from data_prep.source_volume import SourceVolume


def find_volumes(
    folder: Path, split: str, masks: Path | None = None
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """List the volumes of a folder and its sub-folders.

    Args:
        folder: of ``.nii.gz`` or ``.nii`` files in HU with right headers.
        split: to write them as.
        masks: folder of TotalSegmentator label maps with the volumes' file names.

    Returns:
        The volumes, and those whose name two files share.

    Raises:
        FileNotFoundError: if the folder has no volume, or ``masks`` none of theirs.
    """
    found = find_nifti(folder) if folder.is_dir() else {}
    if masks is not None and masks.resolve().is_relative_to(folder.resolve()):
        inside = masks.resolve()
        found = {
            volume: [path for path in paths if not path.resolve().is_relative_to(inside)]
            for volume, paths in found.items()
        }
    found = {volume: paths for volume, paths in found.items() if paths}
    if not found:
        raise FileNotFoundError(f"folder must hold .nii.gz or .nii volumes, got none in '{folder}'.")
    label_maps = find_nifti(masks) if masks is not None and masks.is_dir() else {}
    if masks is not None and not label_maps.keys() & found.keys():
        raise FileNotFoundError(f"masks must hold label maps named like the volumes, got none in '{masks}'.")
    sources, rejected = [], []
    for volume, files in found.items():
        try:
            ct = only_file(files, "a volume")
            ts = only_file(label_maps[volume], "a label map") if volume in label_maps else None
        except RejectedError as error:
            rejected.append(error.of(volume))
        else:
            sources.append(
                SourceVolume(volume, split, ct, "v2", ts=ts, source=ct.relative_to(folder).as_posix())
            )
    return sources, rejected
