from pathlib import Path

import numpy as np
import pytest
import torch

import dale_ct
from common.embeddings.ct_batches import SliceBatches
from common.networks.encoder import SlicesInferer
from dale_ct.embedding import embed, embed_to_store

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def store_of_the_bundle(small_bundle, ct_folder, python_m, tmp_path) -> dale_ct.EmbeddingStore:
    """Embeddings that the bundle's own command writes."""
    words = ["monai.bundle", "run", "--config_file", small_bundle / "configs" / "inference.json"]
    words += ["--bundle_root", small_bundle, "--dataset_dir", ct_folder, "--output_dir", tmp_path / "bundle"]
    words += ["--encoder_weights", "$None", "--patch_tokens", "True", "--num_workers", "0"]
    result = python_m(words, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert result.returncode == 0, result.stderr
    return dale_ct.EmbeddingStore(tmp_path / "bundle")


def test_one_call_gives_what_the_bundle_gives(store_of_the_bundle, small_bundle, ct_folder, tmp_path):
    options = {"encoder": str(small_bundle), "weights": "random", "patch_tokens": True}
    found = embed(ct_folder, **options)
    embed_to_store(ct_folder, tmp_path / "store", **options)
    store = dale_ct.EmbeddingStore(tmp_path / "store")
    assert store.identity == store_of_the_bundle.identity
    assert set(found) == set(store.volumes) == {"a", "b"}
    for volume, embedding in found.items():
        expected, written = store_of_the_bundle.read(volume), store.read(volume)
        assert embedding.metadata == expected.metadata == written.metadata
        assert torch.equal(embedding.tokens, expected.tokens)
        assert torch.equal(written.tokens, expected.tokens)
        assert torch.equal(embedding.z_mm, expected.z_mm)
        assert torch.equal(embedding.patches, store_of_the_bundle.read_patches(volume))


def test_one_ct_gives_one_embedding(small_bundle, ct_folder):
    embedding = embed(ct_folder / "b.nii.gz", str(small_bundle), weights="random")
    assert embedding.tokens.shape == (5, 24)
    assert embedding.z_mm.tolist() == [0, 3, 6, 9, 12]
    assert embedding.patches is None


def test_a_broken_ct_is_told_and_the_others_are_embedded(small_bundle, ct_folder, caplog):
    (ct_folder / "c.nii").write_bytes(b"no NIfTI")
    found = embed(ct_folder, str(small_bundle), weights="random")
    assert set(found) == {"a", "b"}
    assert "'c'" in caplog.text
    with pytest.raises(ValueError, match=r"'c'"):
        embed(ct_folder / "c.nii", str(small_bundle), weights="random")


def test_a_second_run_adds_what_is_new(small_bundle, ct_folder, tmp_path):
    options = {"encoder": str(small_bundle), "weights": "random"}
    embed_to_store(ct_folder / "a.nii.gz", tmp_path / "store", **options)
    embed_to_store(ct_folder, tmp_path / "store", **options)
    assert len(dale_ct.EmbeddingStore(tmp_path / "store")) == 2


def test_batches_shrink_to_what_fits_into_the_gpu(small_bundle, ct_folder, monkeypatch, caplog):
    whole = embed(ct_folder / "a.nii.gz", str(small_bundle), weights="random", patch_tokens=True)
    fits = SlicesInferer.__call__

    def too_much(self, images, network, **options):
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return fits(self, images, network, **options)

    monkeypatch.setattr(SlicesInferer, "__call__", too_much)
    shrunk = embed(ct_folder / "a.nii.gz", str(small_bundle), weights="random", patch_tokens=True)
    np.testing.assert_allclose(shrunk.tokens.float(), whole.tokens.float(), atol=1e-3)
    np.testing.assert_allclose(shrunk.patches.float(), whole.patches.float(), atol=1e-3)
    assert [record.args for record in caplog.records if "memory" in record.msg] == [(3,), (1,)]


def test_a_store_is_whole_after_a_stop(small_bundle, ct_folder, tmp_path, monkeypatch):
    begin = SliceBatches.__iter__

    def stopped(self):
        yield next(begin(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(SliceBatches, "__iter__", stopped)
    options = {"encoder": str(small_bundle), "weights": "random", "num_workers": 0}
    with pytest.raises(KeyboardInterrupt):
        embed_to_store(ct_folder / "b.nii.gz", tmp_path / "store", **options)
    monkeypatch.undo()
    assert len(embed_to_store(ct_folder, tmp_path / "store", **options)) == 2


def test_tiles_have_no_patch_tokens(small_bundle, ct_folder):
    with pytest.raises(ValueError, match=r"patch_tokens.*tiled_5cut"):
        embed(ct_folder, str(small_bundle), weights="random", strategy="tiled_5cut", patch_tokens=True)


def test_embeddings_that_are_not_finite_are_rejected(small_bundle, ct_folder, monkeypatch):
    encode = SlicesInferer.__call__

    def overflowing(self, images, network, **options):
        cls, patches = encode(self, images, network, **options)
        return cls * 1e6, patches

    monkeypatch.setattr(SlicesInferer, "__call__", overflowing)
    with pytest.raises(ValueError, match="'b'"):
        embed(ct_folder / "b.nii.gz", str(small_bundle), weights="random")
