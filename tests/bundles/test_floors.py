"""The floors of bundles/_overlays/floors go through the commands of any encoder, and so does the ceiling."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

from common.embeddings.store import EmbeddingStore

FLOORS = sorted((Path(__file__).resolve().parents[2] / "bundles" / "_overlays" / "floors").glob("*.json"))


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hu = np.random.default_rng(0).integers(-1000, 300, (96, 96, 5)).astype(np.int16)
    path = tmp_path_factory.mktemp("ct") / "valid_1_a_1.nii.gz"
    nib.save(nib.Nifti1Image(hu, np.diag([-4.0, -4.0, 5.0, 1.0])), path)
    return path


@pytest.mark.parametrize("floor", FLOORS, ids=lambda path: path.stem)
def test_a_floor_embeds_slices_and_patches(
    floor: Path, workflow: Callable[..., ConfigWorkflow], ct: Path, tmp_path: Path
) -> None:
    knobs = {"dataset_dir": ct, "num_workers": 0, "patch_tokens": True, "encoder_weights": None}
    workflow("dale_ct_2s", "inference", floor, strategies=["raw_full"], **knobs).run()
    store = EmbeddingStore(tmp_path / "out")
    found, patches = store.read("valid_1_a_1"), store.read_patches("valid_1_a_1")
    hu = np.asarray(nib.load(ct).dataobj).T.astype(np.float64)  # slices, rows, columns
    if floor.stem == "pixels":
        z = (hu.clip(-997, 888) + 142.39) / 360.97
        expected = z.reshape(5, 24, 4, 24, 4).mean((2, 4)).reshape(5, 576)
    else:
        clipped = hu.clip(-1000, 1000)
        expected = [np.histogram(image, 64, (-1000, 1000))[0] / image.size for image in clipped]
    np.testing.assert_allclose(found.tokens, expected, atol=1e-4)
    assert patches.shape == (5, 9, found.tokens.shape[1])
    assert found.metadata["patch_grid"] == [3, 3]
    assert store.identity["encoder"] == floor.stem
    assert store.identity["encoder_id"].startswith(f"{floor.stem}:")
    assert store.identity["weights"] == "none"
    assert len(json.loads(floor.read_text())["_desc_"]) > 40
