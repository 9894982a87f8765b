"""``python -m monai.bundle run`` on the inference config: however a CT is stored, its embeddings agree."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from common.data.embedding_store import EmbeddingStore

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLE = REPOSITORY / "bundles" / "dale_ct_2s"
TINY = {
    **{"size_px": 32, "img_size_px": 32, "patch_size_px": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    **{"layer_scale_init": 1.0, "amp_dtype": "float32", "embedding_dtype": "float32", "num_workers": 0},
    **{"encoder_weights": "$None", "slices_per_batch": 5},
}


def run(ct: Path, out: Path, **knobs) -> subprocess.CompletedProcess:
    settings = {"bundle_root": BUNDLE, "dataset_dir": ct, "output_dir": out, **TINY, **knobs}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = str(BUNDLE / "configs" / "inference.json")
    return subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, *words],
        cwd=out.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def stored_as(image: nib.Nifti1Image, axcodes: str) -> nib.Nifti1Image:
    """The same scan with its voxels in another order."""
    change = ornt_transform(io_orientation(image.affine), axcodes2ornt(axcodes))
    data = nib.apply_orientation(np.asarray(image.dataobj), change)
    return nib.Nifti1Image(data, image.affine @ inv_ornt_aff(change, image.shape))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    """Embeddings of one asymmetric scan, stored in four orientations."""
    folder = tmp_path_factory.mktemp("embedded")
    rng = np.random.default_rng(0)
    hu = np.full((48, 44, 11), -1000, np.int16)
    hu[6:44, 6:40] = rng.integers(-100, 200, (38, 34, 11)).astype(np.int16)
    hu[12:20, 10:30, 2:9] = -850
    image = nib.Nifti1Image(hu, np.diag([-1.5, -1.5, 3.0, 1.0]))  # LPS
    (folder / "ct").mkdir()
    for axcodes in ("LPS", "RAS", "LAS", "SPL"):
        nib.save(stored_as(image, axcodes), folder / "ct" / f"{axcodes}.nii.gz")
    result = run(folder / "ct", folder / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_every_slice_has_an_embedding_with_its_place_in_mm(embedded):
    store = EmbeddingStore(embedded / "out")
    embedding = store.read("LPS")
    assert embedding.tokens.shape == (11, 24)
    np.testing.assert_allclose(embedding.z_mm, 3.0 * np.arange(11))
    assert embedding.metadata["spacing_mm"] == [1.5, 1.5, 3.0]
    assert store.identity["encoder"] == "dale_ct_2s"
    assert store.identity["encoder_id"] == "random:42"
    assert float(embedding.tokens.std(0).max()) > 1e-3  # slices differ


@pytest.mark.parametrize("axcodes", ["RAS", "LAS", "SPL"])
def test_the_orientation_of_storage_does_not_change_a_token(embedded, axcodes):
    stored, canonical = (EmbeddingStore(embedded / "out").read(name) for name in (axcodes, "LPS"))
    np.testing.assert_allclose(stored.tokens, canonical.tokens, rtol=0, atol=1e-6)
    np.testing.assert_allclose(stored.z_mm, canonical.z_mm)


def test_a_second_run_has_nothing_to_do_and_another_picture_plane_gives_other_tokens(embedded, tmp_path):
    (part,) = (embedded / "out").iterdir()
    before = part.stat().st_mtime_ns
    assert run(embedded / "ct", embedded / "out").returncode == 0
    assert [path.stat().st_mtime_ns for path in (embedded / "out").iterdir()] == [before]
    assert run(embedded / "ct" / "LPS.nii.gz", tmp_path / "xy", slice_axes="xy").returncode == 0
    transposed = EmbeddingStore(tmp_path / "xy").read("LPS")
    canonical = EmbeddingStore(embedded / "out").read("LPS")
    assert float((transposed.tokens - canonical.tokens).abs().max()) > 1e-3


def test_a_missing_weights_file_says_what_to_do(embedded, tmp_path):
    result = run(embedded / "ct", tmp_path / "out", encoder_weights=str(tmp_path / "none.safetensors"))
    assert result.returncode != 0
    assert "Train the bundle first, or download it" in result.stderr.strip().splitlines()[-1]


@pytest.mark.real_ct
def test_real_cts_are_embedded_in_z_order_with_their_spacing(real_ct_dir, tmp_path):
    result = run(real_ct_dir / "totalseg_example_ct_sm_3mm.nii.gz", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    embedding = EmbeddingStore(tmp_path / "out").read("totalseg_example_ct_sm_3mm")
    assert embedding.tokens.shape == (30, 24)
    np.testing.assert_allclose(np.diff(embedding.z_mm), 3.0, rtol=1e-4)
    assert bool(embedding.tokens.isfinite().all())
