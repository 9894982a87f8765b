"""A small CT on disk and an encoder bundle to look at it with."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

BUNDLE = Path(__file__).resolve().parents[3] / "bundles" / "dale_ct_2s"
SMALL = {"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture
def ct_path(tmp_path: Path) -> Path:
    """A body off the middle, brighter from slice to slice, with a bright block; stored RAS."""
    hu = np.full((60, 50, 9), -1000, np.int16)
    hu[9:50, 4:45] = np.arange(9) * 20
    hu[12:22, 8:16, 3:6] = 900  # stored RAS: to the right and in front
    path = tmp_path / "scan_1.nii.gz"
    nib.save(nib.Nifti1Image(hu[::-1, ::-1], np.diag([0.7, 0.7, 2.5, 1.0])), path)
    return path


@pytest.fixture
def small_json(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL))
    return path


@pytest.fixture
def options(small_json: Path) -> list[str]:
    """Options of every picture command."""
    return ["--bundle", str(BUNDLE), "--weights", "random", "--overrides", str(small_json), "--size-px", "32"]


@pytest.fixture
def bundle() -> Path:
    return BUNDLE
