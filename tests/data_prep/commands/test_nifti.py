from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from common.shards.shards import ShardSet

SHAPE_XYZ = (19, 17, 5)
Invoke = Callable[..., Result]


def test_a_folder_of_nifti_files_is_written(
    tmp_path: Path, tiny: Any, save_nifti: Callable[..., Path], invoke: Invoke
) -> None:
    for name in ("scan-a", "scan-b"):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", tiny.hu(name), tiny.affine())
    save_nifti(tmp_path / "masks" / "scan-b.nii.gz", np.full(SHAPE_XYZ, 51, np.uint8), tiny.affine())
    answer = invoke(
        "nifti", tmp_path / "in", "--out", tmp_path / "out", "--split", "valid", "--masks", tmp_path / "masks"
    )
    assert answer.exit_code == 0, answer.output
    shards = ShardSet(tmp_path / "out", "valid")
    assert [(entry.volume, entry.has_ts) for entry in shards.volumes] == [("scan-a", False), ("scan-b", True)]
    assert np.unique(shards.read_slab(1, 0, 5).read_ts()).tolist() == [51]


@pytest.mark.real_ct
def test_real_scans_and_their_label_maps_are_written(
    real_ct_dir: Path, tmp_path: Path, invoke: Invoke
) -> None:
    """Two scans stored as LPS and RAS, whose label maps are stored as LAS and RAS."""
    for ct, mask in (
        ("example_ct_sm_3mm", "example_sm_seg117_3mm"),
        ("dicom_ct_native", "dicom_seg117_native"),
    ):
        for folder, name in (("ct", ct), ("ts", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            link = tmp_path / folder / f"{ct}.nii.gz"
            link.symlink_to(real_ct_dir / f"totalseg_{name}.nii.gz")
    answer = invoke("nifti", tmp_path / "ct", "--masks", tmp_path / "ts", "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    shards = ShardSet(tmp_path / "out", "train")
    for volume_id, entry in enumerate(shards.volumes):
        ids = shards.read_slab(volume_id, 0, entry.num_slices).read_ts()
        rows, columns = (((np.arange(128) + 0.5) * size / 128).astype(int) for size in entry.shape)
        hu = np.stack([shards.read_slab(volume_id, z, 1).read_ct(0) for z in range(entry.num_slices)])[
            :, rows
        ][:, :, columns]
        for muscle in (86, 87):
            assert -20 < np.median(hu[ids == muscle]) < 80
