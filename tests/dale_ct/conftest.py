"""A small encoder bundle, and CTs for it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dale_ct_2s with a network of one block, computing in float32."""
    folder = tmp_path_factory.mktemp("bundles") / "dale_ct_2s"
    shutil.copytree(REPOSITORY / "bundles" / "dale_ct_2s", folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config |= {**SMALL, "strategies": ["cropped_32"], "amp_dtype": "float32", "slices_per_batch": 7}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def ct_folder(tmp_path: Path, save_nifti) -> Path:
    """Two CTs of 11 and 5 slices: a body of soft tissue in air."""
    folder = tmp_path / "cts"
    folder.mkdir()
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = 40.0, 50.0, -60.0
    for name, num_slices in (("a", 11), ("b", 5)):
        rng = np.random.default_rng(num_slices)
        hu = rng.integers(-1010, -990, (40, 48, num_slices)).astype(np.int16)
        hu[8:32, 10:38] = rng.integers(-200, 200, (24, 28, num_slices))
        save_nifti(folder / f"{name}.nii.gz", hu, affine)
    return folder
