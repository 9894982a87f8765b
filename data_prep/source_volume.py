"""One CT volume and its masks on disk, and how they become what a shard holds."""

from pathlib import Path
from typing import NamedTuple

from common.ct import nifti as nifti_ct
from common.ct import npz as npz_ct
from common.ct.checks import check_hu, find_doubts
from common.ct.geometry import StoredCT, StoredGrid, canonical_shape
from common.ct.nifti import Rescale
from common.ct.rejection import RejectedError
from common.shards.volume import VOLUME_NAME, VolumeSlices
from data_prep.rexgroundingct import Annotation, read_findings
from data_prep.totalsegmentator import read_label_map

NIFTI_FORMS = ("auto", "v1", "v2")

FORMS = (*NIFTI_FORMS, "rad_chestct", "dicom")


class SourceVolume(NamedTuple):
    """A volume to be written into shards.

    Args:
        volume: name.
        split: such as ``train``.
        ct: its file; of a DICOM series the files of its slices.
        form: one of ``FORMS``. NIfTI: ``v2`` is in HU with a header that says so; ``v1`` is raw with a blank
            header, and ``rescale`` says the rest; ``auto`` is v1 iff the header is blank. ``rad_chestct`` is
            npz, ``dicom`` a series.
        rescale: what a table says of it; needed for v1. Of RAD-ChestCT the spacing alone counts.
        ts: TotalSegmentator label map, or None.
        rex: ReXGroundingCT annotation, or None.
        labels: class name to 0 or 1, or None.
        source: path of the CT, of a DICOM series its folder, relative to the input folder.
    """

    volume: str
    split: str
    ct: Path | tuple[Path, ...]
    form: str
    rescale: Rescale | None = None
    ts: Path | None = None
    rex: Annotation | None = None
    labels: dict[str, int] | None = None
    source: str = ""

    def absolute(self) -> "SourceVolume":
        """Return the same with absolute paths, for a worker that stands in another folder."""
        ct = self.ct.absolute() if isinstance(self.ct, Path) else tuple(path.absolute() for path in self.ct)
        rex = self.rex and self.rex._replace(path=self.rex.path.absolute())
        return self._replace(ct=ct, ts=self.ts and self.ts.absolute(), rex=rex)


def planned_slices(source: SourceVolume) -> int:
    """Return the number of slices a volume will have, from headers and metadata alone.

    Args:
        source: the volume.

    Returns:
        Number of slices.

    Raises:
        RejectedError: for everything that can be known without the voxels.
    """
    if not VOLUME_NAME.fullmatch(source.volume):
        raise RejectedError(
            "name", f"volume must match {VOLUME_NAME.pattern}, got '{source.volume}'. Rename its file."
        )
    return canonical_shape(read_grid(source))[0]


def read_volume(source: SourceVolume) -> VolumeSlices:
    """Read a volume and its masks.

    Args:
        source: the volume.

    Returns:
        What a shard holds of it.

    Raises:
        RejectedError: if anything about the CT or a mask is not what it must be.
    """
    ct = read_ct(source)
    check_hu(ct)
    doubts, _ = find_doubts(ct.hu, ct.spacing_mm)
    return VolumeSlices(
        volume=source.volume,
        ct=ct.hu,
        ts=None if source.ts is None else read_label_map(source.ts, ct.grid),
        rex=None if source.rex is None else read_findings(source.rex, ct.grid),
        spacing_mm=ct.spacing_mm,
        original_shape=ct.grid.shape,
        original_axcodes=ct.grid.axcodes,
        labels=source.labels,
        split=source.split,
        source=source.source,
        source_sha256=ct.sha256,
        doubts="; ".join(doubt.text for doubt in doubts),
    )


def read_grid(source: SourceVolume) -> StoredGrid:
    """Read the voxel grid of a volume's CT, whatever its format, from headers alone."""
    if isinstance(source.ct, tuple):
        from common.ct import dicom as dicom_ct

        return dicom_ct.read_grid(source.ct)
    if source.form == "rad_chestct":
        return npz_ct.read_grid(source.ct, *_edge_mm(source))
    return nifti_ct.read_grid(source.ct, source.form, source.rescale)


def read_ct(source: SourceVolume) -> StoredCT:
    """Read a volume's CT, whatever its format."""
    if isinstance(source.ct, tuple):
        from common.ct import dicom as dicom_ct

        return dicom_ct.read_ct(source.ct)
    if source.form == "rad_chestct":
        return npz_ct.read_ct(source.ct, *_edge_mm(source))
    return nifti_ct.read_ct(source.ct, source.form, source.rescale)


def _edge_mm(source: SourceVolume) -> tuple[float, ...]:
    """Return the edge of a voxel where a table states it; nothing leaves it to the dataset's."""
    return () if source.rescale is None else source.rescale.spacing_mm[:1]
