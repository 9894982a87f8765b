"""One CT volume and its masks on disk, and how they become what a shard holds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common.ct import files
from common.ct.files import VOLUME_NAME, CTFile, only_file, unique_names, volume_files, volume_name
from common.ct.geometry import CT, Grid, canonical_shape
from common.ct.nifti import Rescale
from common.ct.rejection import RejectedError, RejectedVolume
from common.shards.writer import VolumeSlices
from data_prep.sources.rexgroundingct import Annotation, read_findings
from data_prep.sources.totalsegmentator import read_label_map

NIFTI_FORMS = ("auto", "v1", "v2")


class SourceVolume(NamedTuple):
    """A volume to be written into shards.

    Args:
        volume: name.
        split: such as ``train``.
        ct: its files.
        form: form of a NIfTI file, one of ``NIFTI_FORMS``: ``v2`` is in HU with a proper header; ``v1`` is
            raw with a blank header, and ``rescale`` says the rest; ``auto`` is v1 if the header is blank.
        rescale: what a table says about it; needed for v1. For RAD-ChestCT only the spacing counts.
        ts: TotalSegmentator label map, or None.
        rex: ReXGroundingCT annotation, or None.
        labels: class name to 0 or 1, or None.
        source: path of the CT, for a DICOM series of its folder, relative to the input folder.
    """

    volume: str
    split: str
    ct: CTFile
    form: str = "v2"
    rescale: Rescale | None = None
    ts: Path | None = None
    rex: Annotation | None = None
    labels: dict[str, int] | None = None
    source: str = ""

    @classmethod
    def of(cls, ct: CTFile, split: str, folder: Path) -> "SourceVolume":
        """Return a volume in HU that was found below a folder, or that is itself the file given as folder."""
        folder = folder.absolute()
        below = folder.parent if folder.is_file() else folder
        return cls(ct.volume, split, ct, source=ct.path.relative_to(below).as_posix())

    def absolute(self) -> "SourceVolume":
        """Return the same with absolute paths, for a worker that runs in another folder."""
        rex = self.rex and self.rex._replace(path=self.rex.path.absolute())
        return self._replace(ts=self.ts and self.ts.absolute(), rex=rex)


def planned_slices(source: SourceVolume) -> int:
    """Return the number of slices a volume will have, from headers and metadata alone.

    Raises:
        RejectedError: for everything that can be known without the voxels.
    """
    if not VOLUME_NAME.fullmatch(source.volume):
        raise RejectedError("name", f"volume name must match {VOLUME_NAME.pattern}, got '{source.volume}'.")
    return canonical_shape(read_grid(source))[0]


def read_volume(source: SourceVolume) -> VolumeSlices:
    """Read a volume and its masks: what a shard holds of it.

    Raises:
        RejectedError: if anything is wrong with the CT or a mask.
    """
    ct = read_ct(source)
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
        doubts="; ".join(doubt.text for doubt in ct.doubts),
    )


def read_grid(source: SourceVolume) -> Grid:
    """Read the voxel grid of a volume's CT, whatever its format, from headers alone."""
    return files.read_grid(source.ct, source.form, source.rescale)


def read_ct(source: SourceVolume) -> CT:
    """Read a volume's CT, whatever its format."""
    return files.read_ct(source.ct, source.form, source.rescale)


def list_sources(
    found: Mapping[str, Sequence[Path]], source_of: Callable[[str, Sequence[Path]], SourceVolume]
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """Make a source of each volume found.

    Args:
        found: volume to its files.
        source_of: makes the source of a volume from its name and files, or raises ``RejectedError``.

    Returns:
        The sources, and the volumes that were rejected.
    """
    sources, rejected = [], []
    for volume, paths in found.items():
        try:
            sources.append(source_of(volume, paths))
        except RejectedError as error:
            rejected.append(error.of(volume))
    return sources, rejected


def with_masks(
    sources: list[SourceVolume], rejected: list[RejectedVolume], masks: Path | None, knob: str
) -> tuple[list[SourceVolume], list[RejectedVolume]]:
    """Give each volume the label map at its own place below another folder, or else that of its name.

    Args:
        sources: volumes.
        rejected: volumes rejected so far.
        masks: folder of label maps; None for none.
        knob: option that names the folder, for errors.

    Returns:
        The volumes, and the rejected ones with those that have several label maps.

    Raises:
        FileNotFoundError: if no volume has one.
    """
    if masks is None or not sources:
        return sources, rejected
    paths = [path for some in volume_files(masks).values() for path in some]
    names = unique_names([path.relative_to(masks) for path in paths])
    found: dict[str, list[Path]] = {}
    for path in paths:
        below = path.relative_to(masks)
        for key in {_place(below), volume_name(below.name), names[below]}:
            found.setdefault(key, []).append(path)
    joined, ambiguous = [], []
    for source in sources:
        maps = found.get(_place(Path(source.source))) or found.get(source.volume, [])
        try:
            joined.append(source._replace(ts=only_file(maps, "label maps") if maps else None))
        except RejectedError as error:
            ambiguous.append(error.of(source.volume))
    if not ambiguous and all(source.ts is None for source in joined):
        raise FileNotFoundError(f"{knob} must hold label maps named like the volumes, got none in '{masks}'.")
    return joined, rejected + ambiguous


def _place(path: Path) -> str:
    return (path.parent / volume_name(path.name)).as_posix()
